// Functions that all kernels share: 16-bit numbers, sums over a warp and a block, the tensor cores' product.
//
// -DBFLOAT16 selects bfloat16; the default is float16. No CUDA header is included, so NVRTC needs nothing else to
// compile this. Tests compile it as C++ after cuda_on_cpu.h, which replaces what only a GPU can do (the #else half
// of the #ifdef below).

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
#define MINUS_INFINITY __uint_as_float(0xff800000u)

struct Half {  // a 16-bit float
    unsigned short bits;
};

struct alignas(16) Half8 {  // 16 bytes, the maximum of one load
    Half at[8];
};

struct alignas(8) Half4 {
    Half at[4];
};

#ifdef CUDA_ON_CPU

// Dynamic shared memory is declared differently; see cuda_on_cpu.h.
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(cuda_on_cpu::dynamic_shared())

__device__ inline float to_float(Half x) { return cuda_on_cpu::to_float(x.bits); }
__device__ inline Half to_half(float x) { return Half{cuda_on_cpu::to_half(x)}; }
__device__ inline unsigned pair(Half first, Half second) {
    return first.bits | static_cast<unsigned>(second.bits) << 16;
}
__device__ inline uint4 load_once(const uint4 *p, bool there) { return there ? *p : uint4{}; }
__device__ inline Half8 load_once(const Half8 *p) { return *p; }
__device__ inline int load_early(const int *p) { return *p; }
__device__ inline void store_release(unsigned long long *p, unsigned long long x) {
    cuda_on_cpu::store_release(p, x);
}
__device__ inline unsigned long long load_acquire(const unsigned long long *p) {
    return cuda_on_cpu::load_acquire(p);
}
__device__ inline long long nanoseconds() { return cuda_on_cpu::nanoseconds(); }
__device__ inline void wait_for_previous() { cuda_on_cpu::wait_for_previous(); }
__device__ inline void let_next_start() { cuda_on_cpu::let_next_start(); }
__device__ inline int cluster_size() { return cuda_on_cpu::blocks.size(); }
__device__ inline int cluster_rank() { return cuda_on_cpu::cluster_rank(); }
__device__ inline void cluster_barrier() { cuda_on_cpu::wait_as(cuda_on_cpu::AT_CLUSTER); }
template <class Value>
__device__ inline const Value *in_block(const Value *own, int rank) {
    return static_cast<const Value *>(cuda_on_cpu::in_block(own, rank));
}
__device__ inline void copy_async(Half *shared, const Half *global) {
    *reinterpret_cast<Half8 *>(shared) = *reinterpret_cast<const Half8 *>(global);
}
__device__ inline void copies_done() {}
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

__device__ inline unsigned pair(Half first, Half second) {  // two neighbors in a matrix, packed for `mma`
    unsigned y;
    asm("mov.b32 %0, {%1, %2};" : "=r"(y) : "h"(first.bits), "h"(second.bits));
    return y;
}

// Weights are read once per pass. So this load bypasses L1, where they would evict other data, and fetches 128 bytes
// into L2: in linear.cu one warp reads 64 of them, and the next warp of the block the others. If `there` is false, the
// result is zero, by a predicate: a `?:` around the load might become a copy of its result, which waits for the load.
__device__ inline uint4 load_once(const uint4 *p, bool there) {
    uint4 x = {};
    asm volatile("{\n"
                 ".reg .pred there;\n"
                 "setp.ne.u32 there, %5, 0;\n"
                 "@there ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 "}"
                 : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
                 : "l"(p), "r"(static_cast<unsigned>(there)));
    return x;
}

// The same for keys and values. The kernel before may write some of them while this one waits, so they cannot be
// loaded with `.nc`, which is for data that no one writes as long as the kernel runs.
__device__ inline Half8 load_once(const Half8 *p) {
    union {
        uint4 words;
        Half8 halves;
    } x;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.words.x), "=r"(x.words.y), "=r"(x.words.z), "=r"(x.words.w)
                 : "l"(p));
    return x.halves;
}

// Loads, before the wait for the previous kernel, what an earlier kernel wrote: from L2, because this
// multiprocessor's L1 may have an older value.
__device__ inline int load_early(const int *p) {
    int x;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

// Copies 16 bytes to shared memory without using registers; copies_done() waits for them.
__device__ inline void copy_async(Half *shared, const Half *global) {
    asm volatile("{\n"
                 ".reg .u64 to;\n"
                 "cvta.to.shared.u64 to, %0;\n"
                 "cp.async.cg.shared.global [to], [%1], 16;\n"
                 "}" ::"l"(shared), "l"(global) : "memory");
}

__device__ inline void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Store and load of a flag for other GPUs: a thread that loads x sees everything that this thread, and all threads
// that passed a barrier with it, wrote before storing x.
__device__ inline void store_release(unsigned long long *p, unsigned long long x) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}

__device__ inline unsigned long long load_acquire(const unsigned long long *p) {
    unsigned long long x;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
    return x;
}

__device__ inline long long nanoseconds() {
    long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// Dependent launches (PTX ISA, "griddepcontrol"). A kernel that is launched as a dependent may start once every block of
// the kernel before it on the stream has called let_next_start or ended. Every thread of a decode pass's kernel calls
// wait_for_previous, which returns when the kernel before has ended and its results can be read, and only then
// let_next_start. So before it waits, a kernel may read what the kernel before the previous one wrote, but nothing of
// the previous one, and it must write nothing. Neither function does anything in a launch that is not a dependent.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Clusters: blocks that run at the same time and can read each other's shared memory. Without clusters, and in a
// launch that asks for none, a block is a cluster by itself.
__device__ inline int cluster_size() {
    int blocks = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
#endif
    return blocks;
}

__device__ inline int cluster_rank() {
    int rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
#endif
    return rank;
}

// Waits for all threads of the cluster that have not ended. What they wrote before can be read afterward.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Returns where block `rank` of the cluster has what this block has at `own`, in shared memory. (On the CPU, only in
// dynamic shared memory.)
template <class Value>
__device__ inline const Value *in_block(const Value *own, int rank) {
#if __CUDA_ARCH__ >= 900
    unsigned long long other;
    asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(own), "r"(rank));
    return reinterpret_cast<const Value *>(other);
#else
    return own;
#endif
}

// Computes c[16, 8] += a[16, 16] @ b[16, 8] of pairs of 16-bit numbers, summed in float32 (PTX ISA, "Matrix Fragments
// for mma.m16n8k16"). With g = l / 4 and t = l % 4, lane l has these elements:
//   a  [g][2t], [g+8][2t], [g][2t+8], [g+8][2t+8]   with the element to the right of each
//   b  [2t][g], [2t+8][g]                           with the element below each
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

// Rounds x to 16 bits, where the explicit operation rounds too.
__device__ inline float rounded(float x) { return to_float(to_half(x)); }

// Multiplies a normalized number by its weight, like ops.rms_norm, or like ops.rms_norm_plus_one with -DPLUS_ONE.
__device__ inline Half with_gain(float normed, Half weight) {
#ifdef PLUS_ONE
    return to_half(normed * (1 + to_float(weight)));
#else
    return to_half(rounded(normed) * to_float(weight));
#endif
}

// The activation of ops.swiglu, or that of ops.geglu with -DGELU.
__device__ inline float activated(float gate) {
#ifdef GELU
    return gate / 2 * (1 + tanhf(0.79788456f * (gate + 0.044715f * gate * gate * gate)));  // sqrt(2 / pi)
#else
    return gate / (1 + expf(-fmaxf(gate, -80.0f)));
#endif
}

// With -DSOFT_CAP ops.soft_cap; otherwise x itself.
__device__ inline float soft_capped(float x, float cap) {
#ifdef SOFT_CAP
    return tanhf(x / cap) * cap;
#else
    return x;
#endif
}

// Rotates a pair by its angle, like ops.apply_rope. Each product is rounded before the sum, which the compiler would
// otherwise fuse into one fma, so the results have the same bits as those of separate operations.
__device__ inline void turn(float &first, float &second, float cosine, float sine) {
    const float original = first;
    first = __fsub_rn(__fmul_rn(first, cosine), __fmul_rn(second, sine));
    second = __fadd_rn(__fmul_rn(second, cosine), __fmul_rn(original, sine));
}

template <class Value>
__device__ inline Value warp_sum(Value x) {  // the same on all lanes
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// Returns the sum over all threads of a block, on all of them. `scratch` is shared memory for 32 values.
template <class Value>
__device__ inline Value block_sum(Value x, Value *scratch) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();  // all threads have read the previous contents of `scratch`
    if (lane == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : Value(0));
}
