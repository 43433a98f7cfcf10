// The threads that work: the library's own, shared by all callers, or a caller's.
#ifndef NEIGHBORHOOD_THREAD_POOL_H_
#define NEIGHBORHOOD_THREAD_POOL_H_

#include <cstdint>
#include <functional>

#include "neighborhood.h"

namespace neighborhood {

// Calls work(i) for every i in [0, count), from up to `threads` threads, the caller's among them, and returns when all
// are done. Callers that run at the same time share the threads: their helpers step back so that no more threads work
// than the largest of their `threads`, or than there are callers. After a fork the child starts anew, with threads of
// its own. If threads cannot be had, the caller works alone.
//
// With `parallel` the threads are the caller's, but for a child after a fork: OpenMP's do not survive one.
void parallel_for(int64_t count, int threads, NeighborhoodParallel parallel, const std::function<void(int64_t)>& work);

// The number of threads that 0 stands for: what `set_default_threads` was told, else the environment variable
// NEIGHBORHOOD_THREADS, else the cores that this process may use.
int default_threads();
void set_default_threads(int threads);

// Working memory of the calling thread, aligned to 64 bytes, kept for its next call unless large. Null if there is
// none.
void* working_memory(size_t bytes);

// Gives large working memory back.
void release_working_memory();

}  // namespace neighborhood

#endif  // NEIGHBORHOOD_THREAD_POOL_H_
