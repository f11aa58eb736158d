// all_reduce: the sum over all ranks of a host, through memory that all their GPUs can read; the counterpart of
// comm.base._sum_in_rank_order. all_reduce_norm: the same sum, then the bias, the residual addition and ops.rms_norm.
//
//   rank 0's region             rank 1's region
//   +-------+-------+-------+   +-------+-------+-------+
//   | slot  | slot  | flags |   | slot  | slot  | flags |    slots Half [2, max_rows, width]
//   +-------+-------+-------+   +-------+-------+-------+    flags unsigned long long [max_rows, RANKS]
//
// Each block computes one row, because the norm needs the whole row. Each thread computes 8 of its columns, which
// stay in registers from the first load to the last store. In its n-th call, a block writes its row into slot n mod
// 2 of its own rank's region and then n into its flag in every region. It waits until all flags in its own region
// have reached n, and reads the row from all regions. docs/architecture.md explains why two alternating slots are
// enough, and the order of these accesses. Each block uses only the slots and flags of its own row, so blocks need not wait for each other. The GPU
// counts n, so that a captured graph can be replayed.
//
//   partial, out, residual, normed Half [rows, width]      one block per row
//   bias (may be null), weight Half [width]
//   regions unsigned long long [RANKS]                     the regions' addresses on this rank's GPU
//   calls unsigned long long [max_rows]                    calls of each block so far; 0 at first, as are the flags
//   missing int [1]                                        0, or 1 + the rank that did not arrive in time
// width is a multiple of 8, at most 8 * blockDim.x. A wait ends after patience_ns: it sets `missing`, and then
// this call and all later ones return at once without writing their results.
//
// A call reads RANKS - 1 rows of 2 * width bytes over the links. All these loads are in flight together, and each
// flag is written to the memory where it is polled. So a call takes the time of two crossings: a flag and a load.

#include "common.h"

struct Place {  // the location of this block's row and flags
    const unsigned long long *regions;
    int max_rows, width;

    __device__ Half8 *row(int rank, int slot) const {
        const long long start = (static_cast<long long>(slot) * max_rows + blockIdx.x) * width;
        return reinterpret_cast<Half8 *>(reinterpret_cast<Half *>(regions[rank]) + start);
    }
    __device__ unsigned long long *flag(int region, int of) const {
        Half *const flags = reinterpret_cast<Half *>(regions[region]) + 2LL * max_rows * width;
        return reinterpret_cast<unsigned long long *>(flags) + blockIdx.x * RANKS + of;
    }
};

// Publishes this rank's row to the other ranks, waits for their rows, and sets `rows` to the addresses of all.
// Returns false, on all threads, if a rank did not arrive.
__device__ inline bool exchange(Place place, const Half *partial, const Half8 *(&rows)[RANKS],
                                unsigned long long *calls, int *missing, int rank, long long patience_ns) {
    const int i = threadIdx.x;
    const unsigned long long number = calls[blockIdx.x] + 1;
    const int slot = number % 2;
    for (int r = 0; r < RANKS; r++) rows[r] = place.row(r, slot);
    if (__syncthreads_or(*missing != 0)) return false;

    const long long start = static_cast<long long>(blockIdx.x) * place.width;
    if (i < place.width / 8) place.row(rank, slot)[i] = reinterpret_cast<const Half8 *>(partial + start)[i];
    __syncthreads();  // the whole row is written before any flag is set
    if (i < RANKS) store_release(place.flag(i, rank), number);
    __syncwarp();  // all flags are set before the waiting begins
    bool arrived = true;
    if (i < RANKS) {
        const long long begun = nanoseconds();
        while (arrived && load_acquire(place.flag(rank, i)) < number) {
            arrived = nanoseconds() - begun < patience_ns;
        }
        if (!arrived) *missing = 1 + i;
    }
    if (i == 0) calls[blockIdx.x] = number;
    return !__syncthreads_or(!arrived);
}

// Returns 8 columns of the sum, added in rank order, so that all ranks get the same bits.
__device__ inline Half8 sum_of(const Half8 *const (&rows)[RANKS]) {
    Half8 terms[RANKS], sum;
#pragma unroll
    for (int r = 0; r < RANKS; r++) terms[r] = rows[r][threadIdx.x];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float total = to_float(terms[0].at[j]);
#pragma unroll
        for (int r = 1; r < RANKS; r++) total += to_float(terms[r].at[j]);
        sum.at[j] = to_half(total);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(1024) all_reduce(const Half *partial, Half *out,
                                                              const unsigned long long *regions,
                                                              unsigned long long *calls, int *missing,
                                                              int rank, int max_rows, int width,
                                                              long long patience_ns) {
    wait_for_previous();
    let_next_start();
    const int i = threadIdx.x;
    const Half8 *rows[RANKS];
    if (!exchange({regions, max_rows, width}, partial, rows, calls, missing, rank, patience_ns)) return;
    Half8 *const out8 = reinterpret_cast<Half8 *>(out + static_cast<long long>(blockIdx.x) * width);
    if (i < width / 8) out8[i] = sum_of(rows);
}

extern "C" __global__ void __launch_bounds__(1024) all_reduce_norm(const Half *partial, Half *residual,
                                                                   const Half *bias, const Half *weight,
                                                                   Half *normed,
                                                                   const unsigned long long *regions,
                                                                   unsigned long long *calls, int *missing,
                                                                   int rank, int max_rows, int width,
                                                                   long long patience_ns, float eps) {
    __shared__ float scratch[WARP];
    const int i = threadIdx.x;
    const bool has_columns = i < width / 8;
    const long long row = static_cast<long long>(blockIdx.x) * width;
    Half8 *const residual8 = reinterpret_cast<Half8 *>(residual + row);
    const Half8 weights = has_columns ? reinterpret_cast<const Half8 *>(weight)[i] : Half8{};
    wait_for_previous();
    let_next_start();
    Half8 x = has_columns ? residual8[i] : Half8{};  // before the wait for other ranks, which hides its time

    const Half8 *rows[RANKS];
    if (!exchange({regions, max_rows, width}, partial, rows, calls, missing, rank, patience_ns)) return;
    float squares = 0;
    if (has_columns) {
        const Half8 sum = sum_of(rows);
        for (int j = 0; j < 8; j++) {
            float addend = to_float(sum.at[j]);
            if (bias != nullptr) addend = rounded(addend + to_float(bias[8 * i + j]));
            x.at[j] = to_half(to_float(x.at[j]) + addend);
            squares += to_float(x.at[j]) * to_float(x.at[j]);
        }
        residual8[i] = x;
    }
    const float rms = sqrtf(block_sum(squares, scratch) / width + eps);
    if (!has_columns) return;
    for (int j = 0; j < 8; j++) {
        x.at[j] = to_half(rounded(to_float(x.at[j]) / rms) * to_float(weights.at[j]));
    }
    reinterpret_cast<Half8 *>(normed + row)[i] = x;
}
