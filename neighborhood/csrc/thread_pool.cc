#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>

namespace neighborhood {
namespace {

struct Job {
  int64_t count;
  int threads;  // that may work on it
  const std::function<void(int64_t)>* work;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};  // on it now, the caller included; changed under Pool::mutex

  bool open() const { return next.load(std::memory_order_relaxed) < count; }
};

struct Pool {
  std::mutex mutex;
  std::condition_variable wake, finished;
  std::list<Job*> jobs;
  int helpers = 0;              // threads that exist
  std::atomic<int> active{0};   // threads that work, callers included
  std::atomic<int> allowed{1};  // the largest `threads` of the jobs at hand
  std::atomic<int> pushed{0};   // jobs so far
};

// Looks out for something for a moment, before a wait: a thread that sleeps takes as long to wake as a small call takes
// in all.
template <typename Done>
void spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
  while (!done() && std::chrono::steady_clock::now() < end)
    for (int i = 0; i < 16 && !done(); i++) {
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
    }
}

// Never freed: helpers may wait on it until the process ends. A forked child, which has no helpers, gets another.
std::atomic<Pool*> pool{nullptr};

std::atomic<bool> forked{false};

void forget_threads() {
  pool.store(nullptr);
  forked = true;
}

// From the library's start on: a process may fork before its first call.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_threads);

Pool* get_pool() {
  Pool* current = pool.load();
  if (current) return current;
  Pool* fresh = new Pool();
  if (pool.compare_exchange_strong(current, fresh)) return fresh;
  delete fresh;
  return current;
}

Job* find_job(Pool* p) {
  for (Job* job : p->jobs)
    if (job->open() && job->workers < job->threads) return job;
  return nullptr;
}

void help(Pool* p) {
  std::unique_lock<std::mutex> lock(p->mutex);
  while (true) {
    Job* job = nullptr;
    const auto found = [&] { return p->active < p->allowed && (job = find_job(p)) != nullptr; };
    if (!found()) {
      const int pushed = p->pushed;
      lock.unlock();
      spin_until([&] { return p->pushed != pushed; });
      lock.lock();
      p->wake.wait(lock, found);
    }
    job->workers++;
    p->active++;
    lock.unlock();
    while (p->active.load(std::memory_order_relaxed) <= p->allowed.load(std::memory_order_relaxed)) {
      const int64_t i = job->next.fetch_add(1);
      if (i >= job->count) break;
      (*job->work)(i);
    }
    lock.lock();
    p->active--;
    job->workers--;
    p->finished.notify_all();
  }
}

// Work that a caller's threads share.
struct Shared {
  int64_t count;
  const std::function<void(int64_t)>* work;
  std::atomic<int64_t> next{0};
};

void work_on(void* data) {
  Shared* shared = static_cast<Shared*>(data);
  for (int64_t i; (i = shared->next.fetch_add(1)) < shared->count;) (*shared->work)(i);
}

int environment_threads() {
  const char* text = std::getenv("NEIGHBORHOOD_THREADS");
  return text ? std::max(0, std::atoi(text)) : 0;
}

int affinity_threads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

std::atomic<int> told_threads{0};

struct Memory {
  void* data = nullptr;
  size_t size = 0;
  ~Memory() { std::free(data); }
};
thread_local Memory memory;
constexpr size_t kKept = size_t(16) << 20;

}  // namespace

int default_threads() {
  if (const int threads = told_threads.load()) return threads;
  if (const int threads = environment_threads()) return threads;
  return affinity_threads();
}

void set_default_threads(int threads) { told_threads.store(std::max(0, threads)); }

void parallel_for(int64_t count, int threads, NeighborhoodParallel parallel, const std::function<void(int64_t)>& work) {
  threads = std::min(threads, 1024);
  if (std::min<int64_t>(threads, count) <= 1) {
    for (int64_t i = 0; i < count; i++) work(i);
    return;
  }
  if (parallel && !forked) {
    Shared shared{count, &work};
    // all of them: asked for fewer, OpenMP would end the others and start them again
    parallel(work_on, &shared, static_cast<unsigned int>(threads), 0);
    return;
  }
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  Pool* p = get_pool();
  Job job;
  job.count = count;
  job.threads = threads;
  job.work = &work;
  {
    std::lock_guard<std::mutex> lock(p->mutex);
    try {
      for (; p->helpers < threads - 1; p->helpers++) std::thread(help, p).detach();
    } catch (const std::system_error&) {  // no more threads: fewer will do
    }
    job.workers = 1;
    p->jobs.push_back(&job);
    p->pushed++;
    p->active++;
    p->allowed = std::max(p->allowed.load(), threads);
  }
  p->wake.notify_all();
  for (int64_t i; (i = job.next.fetch_add(1)) < count;) work(i);
  spin_until([&] { return job.workers == 1; });
  std::unique_lock<std::mutex> lock(p->mutex);
  job.workers--;
  p->active--;
  p->finished.wait(lock, [&] { return job.workers == 0; });
  p->jobs.remove(&job);
  int allowed = 1;
  for (const Job* other : p->jobs) allowed = std::max(allowed, other->threads);
  p->allowed = allowed;
  const bool others = !p->jobs.empty();
  lock.unlock();
  if (others) p->wake.notify_all();  // the caller made room
}

void* working_memory(size_t bytes) {
  if (bytes > memory.size) {
    std::free(memory.data);
    memory.size = 0;
    memory.data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory.data) return nullptr;
    std::memset(memory.data, 0, bytes);  // kernels read margins that they never use
    memory.size = bytes;
  }
  return memory.data;
}

void release_working_memory() {
  if (memory.size <= kKept) return;
  std::free(memory.data);
  memory.data = nullptr;
  memory.size = 0;
}

}  // namespace neighborhood
