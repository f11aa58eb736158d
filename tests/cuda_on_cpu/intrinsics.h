// CPU versions of what kernels call on a GPU: 16-bit numbers, tensor cores, shuffles, barriers, atomics.

#pragma once

namespace cuda_on_cpu {

inline float to_float(unsigned short bits) {
#ifdef BFLOAT16
    const unsigned wide = static_cast<unsigned>(bits) << 16;
    float y;
    memcpy(&y, &wide, 4);
    return y;
#else
    _Float16 x;
    memcpy(&x, &bits, 2);
    return x;
#endif
}

inline unsigned short to_half(float x) {
    unsigned short bits;
#ifdef BFLOAT16
    if (isnan(x)) return 0x7fff;
    unsigned wide;
    memcpy(&wide, &x, 4);
    bits = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
#else
    const _Float16 y = x;
    memcpy(&bits, &y, 2);
#endif
    return bits;
}

inline float half_of(unsigned word, int which) { return to_float(which ? word >> 16 : word & 0xffff); }

// The sums of a tensor core, computed like in minitp/check/sums.py: Hopper's, of 16 products with 25 bits.
constexpr int BLOCK = 16, BITS = 25;

inline double power_of_two(int exponent) {
    const unsigned long long bits = static_cast<unsigned long long>(exponent + 1023) << 52;
    double y;
    memcpy(&y, &bits, 8);
    return y;
}

// Returns the exponent in a number's format; subnormal numbers have that of the smallest normal number.
inline int exponent_of(float x, int smallest) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return std::max(static_cast<int>(bits >> 23 & 0xff) - 127, smallest);
}

// Returns c + a_1 b_1 + .. as a tensor core computes it.
inline float add_block(float c, const float (&a)[BLOCK], const float (&b)[BLOCK]) {
#ifdef BFLOAT16
    const int smallest = -126;
#else
    const int smallest = -14;
#endif
    double plain = c;
    int largest = c == 0 ? -108 - BITS : exponent_of(c, -126);
    for (int k = 0; k < BLOCK; k++) {
        const double product = static_cast<double>(a[k]) * b[k];
        plain += product;
        if (product != 0) largest = std::max(largest, exponent_of(a[k], smallest) + exponent_of(b[k], smallest));
    }
    if (!isfinite(plain)) return plain;

    const double units = power_of_two(BITS - largest);
    long long sum = static_cast<long long>(c * units);  // the cast truncates
    for (int k = 0; k < BLOCK; k++) sum += static_cast<long long>(static_cast<double>(a[k]) * b[k] * units);
    const int length = sum == 0 ? 0 : 64 - __builtin_clzll(llabs(sum)), excess = std::max(length - 24, 0);
    return sum / (1LL << excess) * power_of_two(excess) / units;  // 24 bits; the division truncates too
}

// The tensor cores' product; `mma` in common.h says which lane has which elements.
inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    Warp &warp = block->warps[current / LANES];
    const int lane = current % LANES;
    for (int i = 0; i < 4; i++) warp.words[lane][i] = a[i];
    for (int i = 0; i < 2; i++) warp.words[lane][4 + i] = b[i];
    warp_barrier();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
        float of_row[BLOCK], of_column[BLOCK];
        for (int k = 0; k < BLOCK; k++) {
            const unsigned *of_a = warp.words[row % 8 * 4 + k % 8 / 2];
            const unsigned *of_b = warp.words[column * 4 + k % 8 / 2];
            of_row[k] = half_of(of_a[(row >= 8) + (k >= 8 ? 2 : 0)], k % 2);
            of_column[k] = half_of(of_b[4 + (k >= 8)], k % 2);
        }
        c[i] = add_block(c[i], of_row, of_column);
    }
    warp_barrier();
}

template <class Value>
Value of_lane(Value own, int lane) {
    static_assert(sizeof(Value) <= sizeof(Warp::words[0]), "the value does not fit into Warp::words");
    Warp &warp = block->warps[current / LANES];
    memcpy(warp.words[current % LANES], &own, sizeof own);
    warp_barrier();
    Value other;
    memcpy(&other, warp.words[lane], sizeof other);
    warp_barrier();
    return other;
}

// Sleeps for a random time of up to CUDA_ON_CPU_DELAY microseconds, an environment variable, on every fourth call.
inline void delay() {
    static const char *const most = getenv("CUDA_ON_CPU_DELAY");
    static unsigned seed = getpid();
    if (most != nullptr && rand_r(&seed) % 4 == 0) usleep(rand_r(&seed) % atoi(most));
}

// Flags are exchanged with other processes: before and after each of these, the others may do a lot of work.
inline void store_release(unsigned long long *p, unsigned long long x) {
    delay();
    __atomic_store_n(p, x, __ATOMIC_RELEASE);
    delay();
}

inline unsigned long long load_acquire(const unsigned long long *p) {
    sched_yield();  // the awaited process may need this core
    const unsigned long long x = __atomic_load_n(p, __ATOMIC_ACQUIRE);
    delay();
    return x;
}

inline long long nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

inline void check_mask(unsigned mask) {
    if (mask != 0xffffffffu) fail("a shuffle within only a part of a warp");
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }

inline int __syncthreads_or(int predicate) {
    static int any;
    any |= predicate != 0;
    __syncthreads();
    const int result = any;
    __syncthreads();
    any = 0;
    __syncthreads();
    return result;
}

inline void __threadfence() {}
inline void __threadfence_system() { __sync_synchronize(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    cuda_on_cpu::check_mask(mask);
    cuda_on_cpu::warp_barrier();
}

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int lane) {
    cuda_on_cpu::check_mask(mask);
    return cuda_on_cpu::of_lane(value, lane % 32);
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int bits) {
    cuda_on_cpu::check_mask(mask);
    return cuda_on_cpu::of_lane(value, cuda_on_cpu::current % 32 ^ bits);
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, int by) {
    cuda_on_cpu::check_mask(mask);
    const int lane = cuda_on_cpu::current % 32;
    return cuda_on_cpu::of_lane(value, lane + by < 32 ? lane + by : lane);
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, int by) {
    cuda_on_cpu::check_mask(mask);
    const int lane = cuda_on_cpu::current % 32;
    return cuda_on_cpu::of_lane(value, lane >= by ? lane - by : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= (__shfl_sync(mask, predicate, lane) != 0) << lane;
    return bits;
}

template <class Value>
Value __ldg(const Value *p) {
    return *p;
}

template <class Value>
Value atomicAdd(Value *p, Value by) {
    const Value before = *p;
    *p += by;
    return before;
}

inline float __expf(float x) { return expf(x); }
inline float __fmul_rn(float x, float y) { return x * y; }  // -ffp-contract=off: never fused into an fma
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

using std::max;
using std::min;
