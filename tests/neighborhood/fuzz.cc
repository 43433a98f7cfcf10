// Calls the kernels' C interface with random arguments, good and hostile, from several threads at once, and compares
// what good calls give with plain loops. Tensors lie in memory of exactly their size, for AddressSanitizer to guard;
// where tokens lie further apart, what is between them is NaN and must stay as it is.
//
//     fuzz CALLS SEED
//
// sanitize.sh builds and runs it under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../neighborhood/csrc/neighborhood.h"

namespace {

typedef std::vector<double> Doubles;

std::atomic<int64_t> good{0}, refused{0}, failures{0};

void report(const char* what, const NeighborhoodShape& s, int type, double error) {
  failures++;
  std::fprintf(
      stderr,
      "%s: type %d, batch %lld, size %lld %lld %lld, heads %lld, head_dim %lld, kernel %lld %lld %lld, dilation "
      "%lld %lld %lld, token_stride %lld: %g\n",
      what, type, (long long)s.batch, (long long)s.depth, (long long)s.height, (long long)s.width, (long long)s.heads,
      (long long)s.head_dim, (long long)s.kernel_depth, (long long)s.kernel_height, (long long)s.kernel_width,
      (long long)s.dilation_depth, (long long)s.dilation_height, (long long)s.dilation_width, (long long)s.token_stride,
      error);
}

// Numbers of a type, in memory of exactly their size: runs of `run` of them, `stride` apart.
class Tensor {
 public:
  Tensor(int type, int64_t count) : Tensor(type, count, std::max<int64_t>(count, 1), std::max<int64_t>(count, 1)) {}
  Tensor(int type, int64_t count, int64_t run, int64_t stride)
      : type_(type), count_(count), run_(run), stride_(stride), size_(count ? place(count - 1) + 1 : 0) {
    memory_.reset(new char[size_ * bytes(type)]);
    std::memset(memory_.get(), 0xff, size_ * bytes(type));  // NaN
  }

  static size_t bytes(int type) { return type == kNeighborhoodFloat64 ? 8 : type == kNeighborhoodFloat32 ? 4 : 2; }
  void* data() const { return memory_.get(); }

  bool gaps_are_untouched() const {
    for (int64_t i = 0; i < size_; i++)
      if (i % stride_ >= run_)
        for (size_t b = 0; b < bytes(type_); b++)
          if (memory_[i * bytes(type_) + b] != '\xff') return false;
    return true;
  }

  double get(int64_t i) const {
    i = place(i);
    if (type_ == kNeighborhoodFloat64) return at<double>(i);
    if (type_ == kNeighborhoodFloat32) return at<float>(i);
    const uint16_t half = at<uint16_t>(i);
    if (type_ == kNeighborhoodBFloat16) {
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double sign = half >> 15 ? -1.0 : 1.0;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
  }

  void set(int64_t i, double x) {
    i = place(i);
    if (type_ == kNeighborhoodFloat64) return put(i, x);
    const float narrow = static_cast<float>(x);
    if (type_ == kNeighborhoodFloat32) return put(i, narrow);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    if (type_ == kNeighborhoodBFloat16) return put(i, static_cast<uint16_t>(bits >> 16));
    const int exponent =
        static_cast<int>(bits >> 23 & 255) - 127 + 15;  // cut off; too large and too small are infinite and 0
    const uint32_t magnitude = exponent <= 0 ? 0 : exponent >= 31 ? 31 << 10 : exponent << 10 | (bits >> 13 & 1023);
    put(i, static_cast<uint16_t>(bits >> 16 & 0x8000 | magnitude));
  }

  int64_t count() const { return count_; }
  Doubles all() const {
    Doubles numbers(count_);
    for (int64_t i = 0; i < count_; i++) numbers[i] = get(i);
    return numbers;
  }

 private:
  int64_t place(int64_t i) const { return i / run_ * stride_ + i % run_; }
  template <typename T>
  T at(int64_t i) const {
    T x;
    std::memcpy(&x, memory_.get() + i * sizeof(T), sizeof(T));
    return x;
  }
  template <typename T>
  void put(int64_t i, T x) {
    std::memcpy(memory_.get() + i * sizeof(T), &x, sizeof(T));
  }

  int type_;
  int64_t count_, run_, stride_, size_;
  std::unique_ptr<char[]> memory_;
};

// Plain loops

struct Axis {
  int64_t length, kernel, dilation;

  int64_t key(int64_t query, int64_t slot) const {
    const int64_t group = query % dilation, in_group = (length - group + dilation - 1) / dilation;
    int64_t start = query / dilation - kernel / 2;
    start = std::max<int64_t>(0, std::min(start, in_group - kernel));
    return (start + slot) * dilation + group;
  }
  int64_t entry(int64_t query, int64_t slot) const {
    return key(query, slot) / dilation - query / dilation + kernel - 1;
  }
};

struct Plain {
  Doubles output, grad_query, grad_key, grad_value, grad_bias;

  Plain(const NeighborhoodShape& s, const Doubles& query, const Doubles& key, const Doubles& value, const Doubles& bias,
        const Doubles& grad, double scale)
      : output(query.size()),
        grad_query(query.size()),
        grad_key(query.size()),
        grad_value(query.size()),
        grad_bias(bias.size()) {
    const Axis axes[3] = {{s.depth, s.kernel_depth, s.dilation_depth},
                          {s.height, s.kernel_height, s.dilation_height},
                          {s.width, s.kernel_width, s.dilation_width}};
    const int64_t window = s.kernel_depth * s.kernel_height * s.kernel_width, dim = s.head_dim;
    const int64_t tokens = s.depth * s.height * s.width;
    std::vector<int64_t> keys(window), entries(window);
    Doubles weights(window), slopes(window);
    for (int64_t b = 0; b < s.batch; b++)
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < s.heads; h++) {
          const int64_t at[3] = {t / (s.height * s.width), t / s.width % s.height, t % s.width};
          for (int64_t j = 0; j < window; j++) {
            const int64_t slot[3] = {j / (s.kernel_height * s.kernel_width), j / s.kernel_width % s.kernel_height,
                                     j % s.kernel_width};
            int64_t token = b;
            entries[j] = h;
            for (int a = 0; a < 3; a++) {
              token = token * axes[a].length + axes[a].key(at[a], slot[a]);
              entries[j] = entries[j] * (2 * axes[a].kernel - 1) + axes[a].entry(at[a], slot[a]);
            }
            keys[j] = (token * s.heads + h) * dim;
          }
          const int64_t q = ((b * tokens + t) * s.heads + h) * dim;
          double largest = -INFINITY, total = 0, delta = 0;
          for (int64_t j = 0; j < window; j++) {
            weights[j] = bias.empty() ? 0.0 : bias[entries[j]];
            for (int64_t d = 0; d < dim; d++) weights[j] += scale * query[q + d] * key[keys[j] + d];
            largest = std::max(largest, weights[j]);
          }
          for (int64_t j = 0; j < window; j++) total += weights[j] = std::exp(weights[j] - largest);
          for (int64_t j = 0; j < window; j++) {
            weights[j] /= total;
            slopes[j] = 0;
            for (int64_t d = 0; d < dim; d++) {
              output[q + d] += weights[j] * value[keys[j] + d];
              slopes[j] += grad[q + d] * value[keys[j] + d];
              grad_value[keys[j] + d] += weights[j] * grad[q + d];
            }
            delta += weights[j] * slopes[j];
          }
          for (int64_t j = 0; j < window; j++) {
            const double slope = weights[j] * (slopes[j] - delta);
            if (!bias.empty()) grad_bias[entries[j]] += slope;
            for (int64_t d = 0; d < dim; d++) {
              grad_query[q + d] += scale * slope * key[keys[j] + d];
              grad_key[keys[j] + d] += scale * slope * query[q + d];
            }
          }
        }
  }
};

// The largest difference, in units of what is allowed.
double difference(const Tensor& actual, const Doubles& expected, int type) {
  double squares = 0, worst = 0;
  for (const double x : expected) squares += x * x;
  const double rms = expected.empty() ? 0.0 : std::sqrt(squares / expected.size());
  // few terms may cancel, so this is wide: mistakes are larger
  const double absolute = type == kNeighborhoodFloat64 ? 1e-10 : 1e-4;
  const double relative = type == kNeighborhoodFloat16 ? 1e-3 : type == kNeighborhoodBFloat16 ? 8e-3 : 0.0;
  for (size_t i = 0; i < expected.size(); i++) {
    const double error = std::abs(actual.get(i) - expected[i]);
    const double allowed = absolute * (rms + 0.1) + relative * std::abs(expected[i]);
    worst = std::max(worst, std::isnan(error) ? INFINITY : error / allowed);
  }
  return worst;
}

// Threads of a caller.
void run_threads(void (*work)(void*), void* data, unsigned int count, unsigned int) {
  std::vector<std::thread> threads;
  for (unsigned int i = 1; i < count; i++) threads.emplace_back(work, data);
  work(data);
  for (std::thread& thread : threads) thread.join();
}

// Random arguments

class Caller {
 public:
  explicit Caller(uint64_t seed) : random_(seed) {}

  void call() {
    NeighborhoodShape shape = good_shape();
    int type = below(4);
    const bool hostile = below(3) == 0;
    if (hostile)
      for (int i = below(3); i >= 0; i--) spoil(&shape, &type);
    if (!is_good(shape) || type < 0 || type > 3)
      expect_refusal(shape, type);
    else if (products(shape) > 10000000 || table(shape) > 200000 || extent(shape) > 10000000)
      expect_refusal(shape, type);  // of null: so much would take too long
    else
      run(shape, type);
  }

 private:
  int64_t below(int64_t end) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(end)); }

  static __int128 elements(const NeighborhoodShape& s) {
    __int128 product = 1;
    for (const int64_t size : {s.batch, s.depth, s.height, s.width, s.heads, s.head_dim}) product *= size;
    return product;
  }

  static __int128 products(const NeighborhoodShape& s) {
    return elements(s) * s.kernel_depth * s.kernel_height * s.kernel_width;
  }

  static __int128 extent(const NeighborhoodShape& s) {
    __int128 tokens = 1;
    for (const int64_t size : {s.batch, s.depth, s.height, s.width}) tokens *= size;
    return s.token_stride * std::max<__int128>(tokens, 1);
  }

  static __int128 table(const NeighborhoodShape& s) {
    __int128 product = s.heads;
    for (const int64_t kernel : {s.kernel_depth, s.kernel_height, s.kernel_width}) product *= 2 * kernel - 1;
    return product;
  }

  static bool is_good(const NeighborhoodShape& s) {
    const int64_t sizes[] = {s.batch, s.depth, s.height, s.width, s.heads, s.head_dim};
    __int128 product = 1;
    for (const int64_t size : sizes) {
      if (size < 0) return false;
      product *= std::max<int64_t>(size, 1);
      if (product >> 46) return false;
    }
    if (s.token_stride && s.token_stride < s.heads * s.head_dim) return false;
    if (s.token_stride && extent(s) >> 46) return false;
    const int64_t axes[3][3] = {{s.depth, s.kernel_depth, s.dilation_depth},
                                {s.height, s.kernel_height, s.dilation_height},
                                {s.width, s.kernel_width, s.dilation_width}};
    __int128 window = 1;
    for (const auto& axis : axes) {
      if (axis[1] < 1 || axis[2] < 1 || static_cast<__int128>(axis[1]) * axis[2] > axis[0]) return false;
      window *= axis[1];
    }
    return !(window >> 32) && !(s.kernel_width >> 20);
  }

  NeighborhoodShape good_shape() {
    NeighborhoodShape s;
    int64_t* axes[3][3] = {{&s.depth, &s.kernel_depth, &s.dilation_depth},
                           {&s.height, &s.kernel_height, &s.dilation_height},
                           {&s.width, &s.kernel_width, &s.dilation_width}};
    const int dimensions = 1 + below(3);
    for (int axis = 0; axis < 3; axis++) {
      *axes[axis][0] = *axes[axis][1] = *axes[axis][2] = 1;
      if (axis < 3 - dimensions) continue;
      *axes[axis][1] = 1 + below(dimensions == 3 ? 3 : axis == 2 ? 9 : 5);
      *axes[axis][2] = below(3) ? 1 : 1 + below(3);
      *axes[axis][0] = *axes[axis][1] * *axes[axis][2] + (below(3) ? below(dimensions == 3 ? 4 : 9) : 0);
      if (axis == 2 && dimensions < 3 && below(4) == 0) *axes[axis][0] += below(80);
    }
    s.batch = below(10) ? 1 + below(2) : 0;
    s.heads = 1 + below(2);
    s.head_dim = below(2) ? 1 + below(40) : 16 * (1 + below(2));
    if (dimensions == 2 && below(300) == 0) {  // heads of large maps are worked on in step
      s.batch = 1;
      s.height += 24;
      s.width += 96;
      s.heads = 3 + below(4);
      s.head_dim = 32;
    }
    s.token_stride = below(2) ? 0 : (1 + below(3)) * s.heads * s.head_dim + below(3);
    return s;
  }

  void spoil(NeighborhoodShape* shape, int* type) {
    const int64_t values[] = {0,         -1,       1, 2, INT64_MIN, INT64_MAX, 1LL << 20, 1LL << 31, (1LL << 32) - 1,
                              1LL << 46, 1LL << 62};
    int64_t* fields = reinterpret_cast<int64_t*>(shape);
    const int64_t field = below(sizeof(*shape) / 8 + 1);
    if (field == sizeof(*shape) / 8)
      *type = static_cast<int>(values[below(11)]);
    else
      fields[field] = below(4) ? values[below(11)] : std::max<int64_t>(fields[field], -9) / 2 + below(7) - 3;
  }

  void expect_refusal(const NeighborhoodShape& s, int type) {
    const bool empty = is_good(s) && elements(s) == 0;
    const char* forward =
        neighborhood_forward(type, &s, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1.0, 1, nullptr);
    const char* backward = neighborhood_backward(type, &s, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                                 nullptr, nullptr, nullptr, nullptr, 1.0, 1, nullptr);
    if (!empty && (!forward || !backward || !*backward)) report("not refused", s, type, 0);
    refused++;
  }

  void fill(Tensor* tensor, bool odd) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < tensor->count(); i++) tensor->set(i, normal(random_));
    const double numbers[] = {NAN, INFINITY, -INFINITY, 1e38, -1e38, 1e-40, 0.0, -0.0};
    for (int64_t i = below(5); odd && i > 0 && tensor->count(); i--)
      tensor->set(below(tensor->count()), numbers[below(8)]);
  }

  void run(const NeighborhoodShape& s, int type) {
    const int64_t count = static_cast<int64_t>(elements(s));
    const int64_t entries = static_cast<int64_t>(table(s));
    const bool biased = below(2), odd = below(4) == 0;
    const int64_t run = std::max<int64_t>(s.heads * s.head_dim, 1), stride = std::max(s.token_stride, run);
    Tensor query(type, count, run, stride), key(type, count, run, stride), value(type, count, run, stride),
        grad(type, count), bias(type, biased ? entries : 0);
    for (Tensor* tensor : {&query, &key, &value, &grad, &bias}) fill(tensor, odd);
    Tensor output(type, count), grad_query(type, count, run, stride), grad_key(type, count, run, stride),
        grad_value(type, count, run, stride), grad_bias(type, biased ? entries : 0),
        logsumexp(kNeighborhoodFloat64, s.head_dim ? count / s.head_dim : 0);
    const double scales[] = {0.3, 1.0, 0.0, -2.0, 1e300, NAN, INFINITY};
    const double scale = odd ? scales[below(7)] : 0.3;
    const int threads = static_cast<int>(below(4)) - 1;
    const NeighborhoodParallel parallel = below(2) ? run_threads : nullptr;
    void* table_data = biased ? bias.data() : nullptr;
    const char* problem = neighborhood_forward(
        type, &s, query.data(), key.data(), value.data(), table_data, output.data(),
        below(4) || !odd ? static_cast<double*>(logsumexp.data()) : nullptr, scale, threads, parallel);
    if (problem) return report(problem, s, type, 0);
    problem =
        neighborhood_backward(type, &s, query.data(), key.data(), value.data(), table_data,
                              static_cast<double*>(logsumexp.data()), grad.data(), grad_query.data(), grad_key.data(),
                              grad_value.data(), biased ? grad_bias.data() : nullptr, scale, threads, parallel);
    if (problem) return report(problem, s, type, 0);
    good++;
    for (const Tensor* tensor : {&grad_query, &grad_key, &grad_value})
      if (!tensor->gaps_are_untouched()) report("written between tokens", s, type, 0);
    if (odd || count == 0) return;
    const Plain plain(s, query.all(), key.all(), value.all(), bias.all(), grad.all(), scale);
    const std::pair<const Tensor*, const Doubles*> pairs[] = {{&output, &plain.output},
                                                              {&grad_query, &plain.grad_query},
                                                              {&grad_key, &plain.grad_key},
                                                              {&grad_value, &plain.grad_value},
                                                              {&grad_bias, &plain.grad_bias}};
    const char* names[] = {"output", "grad_query", "grad_key", "grad_value", "grad_bias"};
    for (int i = 0; i < 5; i++) {
      const double error = difference(*pairs[i].first, *pairs[i].second, type);
      if (error > 1) report(names[i], s, type, error);
    }
  }

  std::mt19937_64 random_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: fuzz CALLS SEED\n");
    return 2;
  }
  const int64_t calls = std::atoll(arguments[1]);
  const uint64_t seed = std::strtoull(arguments[2], nullptr, 10);
  std::string sets;
  int64_t done = 0;
  const std::vector<const char*> names = {"avx512", "avx2", "baseline"};
  std::vector<const char*> available;
  for (const char* name : names)
    if (!neighborhood_set_instruction_set(name)) available.push_back(name);
  for (size_t i = 0; i < available.size(); i++) {
    neighborhood_set_instruction_set(available[i]);
    sets += (i ? ", " : "") + std::string(available[i]);
    const int64_t end = calls * static_cast<int64_t>(i + 1) / static_cast<int64_t>(available.size());
    std::atomic<int64_t> next{done};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; t++)
      threads.emplace_back([&] {
        for (int64_t call; (call = next.fetch_add(1)) < end;) Caller(seed * 1000003 + call).call();
      });
    for (std::thread& thread : threads) thread.join();
    done = end;
  }
  std::printf("%lld calls on %s: %lld ran, %lld were refused, %lld failures\n", (long long)calls, sets.c_str(),
              (long long)good.load(), (long long)refused.load(), (long long)failures.load());
  return failures ? 1 : 0;
}
