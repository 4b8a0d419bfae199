// The three int8 operators for a CPU with VNNI. kernels/vitrail_kernels/ops has their references:
// norm_quant.py, linear_int8.py, linear_int8_grouped.py. Every tensor is contiguous, codes are
// int8, all else is fp32. A row's result depends neither on other rows nor on threads.
#pragma once

#include <cstdint>

// Where the kernels are compiled. The host's compiler must know GCC's target pragma.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VITRAIL_AVX512_VNNI (__GNUC__ >= 9)
#define VITRAIL_AVX_VNNI (__GNUC__ >= 12)
#endif

namespace vitrail::int8 {

enum class Activation : int { none, gelu, gelu_tanh, quick_gelu, relu, silu };

constexpr int64_t kPanel = 128;  // rows of a weight that a task computes together

struct NormQuant {
    int8_t* out;           // (rows, width)
    float* out_scale;      // (rows,)
    const float* x;        // (any, width)
    const float* smooth;   // (width,)
    const int32_t* picks;  // (rows,) or null: rows of x
    int64_t rows, width;   // width is a multiple of 16
    float eps;
};

struct Linear {
    float* out;         // (rows, columns), or half the columns if gated; null if codes are wanted
    int8_t* codes;      // the same, or null
    float* code_scale;  // (groups, rows), or null
    const int8_t* x;    // (rows, depth)
    const float* x_scale;  // (rows,)
    const int8_t* weight;  // (columns, depth)
    const float* weight_scale;
    const float* bias;  // (columns,) each
    int64_t rows, columns, depth;  // depth is a multiple of 4; columns of 128 if codes are wanted
    Activation activation;
    bool gated, is_unsigned;
};

struct LinearGrouped {
    float* out;            // (rows, columns)
    const int8_t* x;       // (rows, depth)
    const float* x_scale;  // (depth / group, rows)
    const int8_t* weight;  // (columns, depth)
    const float* weight_scale;
    const float* shift;  // (depth / group, columns)
    const float* bias;
    const float* scale;            // (columns,) or null
    const float* residual;         // or null; may be out
    const int32_t* residual_rows;  // or null
    int64_t rows, columns, depth, group;  // group is a multiple of 4, at most 256
};

// The weight of a product, in groups of columns.
struct Weight {
    const int8_t* codes;  // (columns, depth)
    const float* shift;   // (depth / group, columns) or null
    int64_t columns, depth, group;
};

// A part of an operator: rows [first, last), and for a product one panel of its columns.
struct Task {
    int64_t panel, first, last;
};

// One set of instructions. `pack` writes a panel of a weight into a thread's own memory: `packed`
// has kPanel * depth codes, `begin` kPanel integers a group. `bytes` has room for kMostRows rows
// of x.
struct Kernels {
    const char* name;
    void (*norm_quant)(const NormQuant&, const Task&);
    void (*pack)(const Weight&, int64_t panel, int8_t* packed, int32_t* begin);
    void (*linear)(const Linear&, const Task&, const int8_t* packed, const int32_t* begin,
                   uint8_t* bytes);
    void (*grouped)(const LinearGrouped&, const Task&, const int8_t* packed, const int32_t* begin,
                    uint8_t* bytes);
};
constexpr int64_t kMostRows = 6;

extern const Kernels kAvx512, kAvxVnni;

// The name of the instructions in use; empty if this CPU or this build has none.
const char* instructions();

// Uses the instructions of that name from now on, if the CPU has them: for tests. False if not.
bool use(const char* name);

// These run on at most `threads` threads. They throw std::runtime_error without instructions.
void norm_quant(const NormQuant& call, int threads);
void linear(const Linear& call, int threads);
void linear_grouped(const LinearGrouped& call, int threads);

}  // namespace vitrail::int8
