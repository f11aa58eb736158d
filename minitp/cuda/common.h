// What all kernels share: 16-bit numbers, sums over a warp and a block, the tensor cores' product.
//
// Compiled with -DBFLOAT16 for bfloat16, without for float16. No header of CUDA's is needed, so NVRTC compiles
// this with nothing but itself; tests compile it as C++ with cuda_on_cpu.h in front, which has its own version
// of what only a GPU can do (the second half of each #ifdef).

#pragma once

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct Half {  // a 16-bit float
    unsigned short bits;
};

struct alignas(16) Half8 {  // what one load takes
    Half at[8];
};

#ifdef CUDA_ON_CPU

// The linkage of dynamic shared memory differs; see cuda_on_cpu.h.
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(cuda_on_cpu::dynamic_shared())

__device__ inline float to_float(Half x) { return cuda_on_cpu::to_float(x.bits); }
__device__ inline Half to_half(float x) { return Half{cuda_on_cpu::to_half(x)}; }
__device__ inline Half8 load_once(const Half8 *p) { return *p; }
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    cuda_on_cpu::mma(c, a, b);
}

#else

#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    type *name = reinterpret_cast<type *>(name##_bytes)

__device__ inline float to_float(Half x) {
#ifdef BFLOAT16
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

__device__ inline Half to_half(float x) {  // to nearest, ties to even
    Half y;
#ifdef BFLOAT16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
    return y;
}

// Weights are read once a step: past L1, so that they push nothing out of it.
__device__ inline Half8 load_once(const Half8 *p) {
    union {
        uint4 words;
        Half8 halves;
    } x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.words.x), "=r"(x.words.y), "=r"(x.words.z), "=r"(x.words.w)
                 : "l"(p));
    return x.halves;
}

// c[16, 8] += a[16, 16] @ b[16, 8], of 16-bit numbers in pairs, summed in float32 (PTX ISA, "Matrix Fragments
// for mma.m16n8k16"). Lane l has g = l / 4 and t = l % 4, and of the matrices
//   a  [g][2t], [g+8][2t], [g][2t+8], [g+8][2t+8]   and the element right of each
//   b  [2t][g], [2t+8][g]                           and the element below each
//   c  [g][2t], [g][2t+1], [g+8][2t], [g+8][2t+1]
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef BFLOAT16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

// x, rounded to 16 bits and back: where the explicit operation rounds, the kernel does too.
__device__ inline float rounded(float x) { return to_float(to_half(x)); }

__device__ inline float warp_sum(float x) {  // the same on all lanes
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// The sum over all threads of a block, the same on all of them. `room` is shared, of 32 floats.
__device__ inline float block_sum(float x, float *room) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();  // whoever used the room before has read it
    if (lane == 0) room[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum(lane < warps ? room[lane] : 0.0f);
}
