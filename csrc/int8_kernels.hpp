// The int8 operators over vectors of kLanes numbers. int8_avx512.cpp and int8_avx_vnni.cpp define
// the vectors (Floats, Ints), kRows, kVectors and the functions `dot`, `fma`, `to_ints`, `half`,
// `codes`, and include this file.
//
// No function of the standard library's headers is used: a copy compiled for these instructions
// could be the one that the linker keeps for all CPUs. A function that computes with fp32 is
// compiled once for all rows (noinline), so that equal rows have equal bits.

namespace vitrail::int8 {
namespace {

constexpr int64_t kTile = int64_t{kVectors} * kLanes;  // columns of a tile
constexpr int64_t kTiles = kPanel / kTile;
constexpr float kTiny = 1e-30f, kOffset = 0.17f, kFloatOfInteger = 12582912.f;

#define VITRAIL_INLINE inline __attribute__((always_inline))
#define VITRAIL_ONCE __attribute__((noinline, noclone))

VITRAIL_INLINE Floats all(float value) { return value - Floats{}; }
VITRAIL_INLINE Ints all(int32_t value) { return value - Ints{}; }
VITRAIL_INLINE Floats load(const float* from) {
    Floats value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}
VITRAIL_INLINE Ints load(const int32_t* from) {
    Ints value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}
VITRAIL_INLINE Ints load(const int8_t* from) {
    Ints value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}
template <class T, class Vector>
VITRAIL_INLINE void store(T* to, Vector value) {
    __builtin_memcpy(to, &value, sizeof value);
}
VITRAIL_INLINE Floats floats(Ints value) { return __builtin_convertvector(value, Floats); }
VITRAIL_INLINE Ints bits(Floats value) { return reinterpret_cast<Ints>(value); }
VITRAIL_INLINE Floats from_bits(Ints value) { return reinterpret_cast<Floats>(value); }
VITRAIL_INLINE Ints magnitude(Floats value) { return bits(value) & 0x7fffffff; }
VITRAIL_INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }
VITRAIL_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

template <class Vector>
VITRAIL_INLINE auto largest(Vector value) {
    auto top = value[0];
    for (int lane = 1; lane < kLanes; ++lane) top = value[lane] > top ? value[lane] : top;
    return top;
}

VITRAIL_INLINE float sum(Floats value) {
    for (int half = kLanes / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) value[lane] += value[lane + half];
    return value[0];
}

VITRAIL_INLINE float as_float(int32_t value) {
    float result;
    __builtin_memcpy(&result, &value, sizeof result);
    return result;
}

constexpr int32_t kInfinity = 0x7f800000;

// ---- activations

// 2^p, with a relative error of 2e-7; at least 2^-126 and at most 2^127. NaN gives some number.
VITRAIL_INLINE Floats exp2(Floats p) {
    p = p > -126.f ? p : all(-126.f);
    p = p < 127.f ? p : all(127.f);
    const Ints whole = to_ints(p);
    const Floats f = p - floats(whole);
    Floats y = all(1.5403530e-4f);  // Taylor's series about 0, |f| <= 1/2
    y = fma(y, f, all(1.3333558e-3f));
    y = fma(y, f, all(9.6181291e-3f));
    y = fma(y, f, all(5.5504109e-2f));
    y = fma(y, f, all(2.4022651e-1f));
    y = fma(y, f, all(6.9314718e-1f));
    y = fma(y, f, all(1.f));
    return from_bits(bits(y) + (whole << 23));
}

// y sigmoid(-s ln 2)
VITRAIL_INLINE Floats times_sigmoid(Floats y, Floats s) { return y / (1.f + exp2(s)); }

// vitrail_kernels/device/activations.py has the formulas.
template <Activation kind>
VITRAIL_INLINE Floats activate(Floats y) {
    constexpr float kLog2e = 1.4426950408889634f;
    if constexpr (kind == Activation::gelu) {
        const Floats size = from_bits(magnitude(y));
        Floats p = fma(size, all(-9.29414796e-07f), all(4.77642279e-05f));
        p = fma(size, p, all(-0.000847924908f));
        p = fma(size, p, all(0.00826437213f));
        p = fma(size, p, all(-0.0535915047f));
        p = fma(size, p, all(-0.458733797f));
        p = fma(size, p, all(-1.15117252f));
        p = fma(size, p, all(-1.f));
        return fma(-size, exp2(p), larger(y, Floats{}));
    } else if constexpr (kind == Activation::gelu_tanh) {
        constexpr float kSlope = -1.5957691216057308f * kLog2e;
        return times_sigmoid(y, y * fma(y * y, all(0.044715f * kSlope), all(kSlope)));
    } else if constexpr (kind == Activation::quick_gelu) {
        return times_sigmoid(y, y * (-1.702f * kLog2e));
    } else if constexpr (kind == Activation::relu) {
        return y < 0.f ? Floats{} : y;
    } else if constexpr (kind == Activation::silu) {
        return times_sigmoid(y, y * -kLog2e);
    } else {
        return y;
    }
}

// ---- norm_quant

VITRAIL_ONCE void norm_quant_row(const NormQuant& call, const float* x, int8_t* out, float* scale) {
    const int64_t width = call.width;
    constexpr int kChains = 16 / kLanes * 2;  // 32 numbers at once, in 2 or 4 vectors
    Floats total[kChains] = {};
    int64_t at = 0;
    for (; at + kChains * kLanes <= width; at += kChains * kLanes)
        for (int c = 0; c < kChains; ++c) total[c] += load(x + at + c * kLanes);
    for (int c = 0; at < width; at += kLanes, ++c) total[c] += load(x + at);
    for (int c = 1; c < kChains; ++c) total[0] += total[c];
    const float mean = sum(total[0]) / static_cast<float>(width);

    Floats squares[kChains] = {};
    at = 0;
    for (; at + kChains * kLanes <= width; at += kChains * kLanes)
        for (int c = 0; c < kChains; ++c) {
            const Floats apart = load(x + at + c * kLanes) - mean;
            squares[c] = fma(apart, apart, squares[c]);
        }
    for (int c = 0; at < width; at += kLanes, ++c) {
        const Floats apart = load(x + at) - mean;
        squares[c] = fma(apart, apart, squares[c]);
    }
    for (int c = 1; c < kChains; ++c) squares[0] += squares[c];
    const float rstd =
        1.f / __builtin_sqrtf(sum(squares[0]) / static_cast<float>(width) + call.eps);

    Ints tops[2] = {};  // as integers, because the bits of NaN are above those of any number
    for (at = 0; at < width; at += kLanes) {
        const Floats y = (load(x + at) - mean) * rstd * load(call.smooth + at);
        tops[at / kLanes % 2] = larger(tops[at / kLanes % 2], magnitude(y));
    }
    const int32_t top_bits = largest(larger(tops[0], tops[1]));
    if (top_bits >= kInfinity) {
        *scale = __builtin_nanf("");
        __builtin_memset(out, 0, static_cast<size_t>(width));
        return;
    }
    const float top = as_float(top_bits) > kTiny ? as_float(top_bits) : kTiny;
    *scale = top / 127.f;
    const float steps = 127.f / top;
    for (at = 0; at < width; at += kLanes) {
        const Floats y = (load(x + at) - mean) * rstd * load(call.smooth + at);
        codes(out + at, to_ints(y * steps));
    }
}

void norm_quant_rows(const NormQuant& call, const Task& task) {
    for (int64_t row = task.first; row < task.last; ++row) {
        const int64_t pick = call.picks ? call.picks[row] : row;
        norm_quant_row(call, call.x + pick * call.width, call.out + row * call.width,
                       call.out_scale + row);
    }
}

// ---- the product

// A panel's tiles, one after the other: [depth / 4][kTile][4]. A column past the last is zero.
// `begin` (tiles, groups, kTile) receives the integers that each group's sums start from: -128
// times the sum of the group's codes, because `dot` multiplies codes + 128, and the shift.
void pack_panel(const Weight& call, int64_t panel, int8_t* packed, int32_t* begin) {
    const int64_t columns = call.columns, depth = call.depth;
    const Ints ones = all(int32_t{0x01010101});
    for (int64_t tile = 0; tile < kTiles; ++tile) {
        const int64_t first = panel * kPanel + tile * kTile;
        int8_t* to = packed + tile * depth * kTile;
        for (int64_t column = 0; column < kTile; ++column) {
            int8_t* words = to + column * 4;
            if (first + column < columns) {
                const int8_t* from = call.codes + (first + column) * depth;
                for (int64_t k = 0; k < depth; k += 4)
                    __builtin_memcpy(words + k * kTile, from + k, 4);
            } else {
                for (int64_t k = 0; k < depth; k += 4) __builtin_memset(words + k * kTile, 0, 4);
            }
        }
        for (int64_t group = 0; group < depth / call.group; ++group) {
            Ints total[kVectors] = {};
            for (int64_t k = group * call.group; k < (group + 1) * call.group; k += 4)
                for (int v = 0; v < kVectors; ++v)
                    total[v] = dot(total[v], ones, load(to + k * kTile + v * kLanes * 4));
            for (int v = 0; v < kVectors; ++v) store(begin + v * kLanes, total[v] * -128);
            if (call.shift)
                for (int64_t column = 0; column < kTile && first + column < columns; ++column)
                    begin[column] += static_cast<int32_t>(
                        kFloatOfInteger - call.shift[group * columns + first + column]);
            begin += kTile;
        }
    }
}

// total += (x + 128) W for `rows` rows of bytes x + 128, `depth` apart, and one tile of W.
template <int rows>
VITRAIL_INLINE void multiply(const uint8_t* x, int64_t depth, const int8_t* tile, int64_t codes,
                             Ints (&total)[rows][kVectors]) {
    for (int64_t k = 0; k < codes; k += 4) {
        Ints weights[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) weights[v] = load(tile + k * kTile + v * kLanes * 4);
#pragma GCC unroll 8
        for (int row = 0; row < rows; ++row) {
            int32_t four;
            __builtin_memcpy(&four, x + row * depth + k, 4);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v)
                total[row][v] = dot(total[row][v], all(four), weights[v]);
        }
    }
}

// The bytes x + 128 of codes x.
VITRAIL_INLINE void raise(uint8_t* to, const int8_t* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(from[i]) ^ 0x80;
}

template <int rows>
void panel_sums(const uint8_t* x, int64_t depth, const int8_t* packed, const int32_t* offsets,
                int32_t* to) {  // to (rows, kPanel)
    for (int64_t tile = 0; tile < kTiles; ++tile) {
        Ints total[rows][kVectors];
        for (int v = 0; v < kVectors; ++v) {
            const Ints begin = load(offsets + tile * kTile + v * kLanes);
            for (int row = 0; row < rows; ++row) total[row][v] = begin;
        }
        multiply<rows>(x, depth, packed + tile * depth * kTile, depth, total);
        for (int row = 0; row < rows; ++row)
            for (int v = 0; v < kVectors; ++v)
                store(to + row * kPanel + tile * kTile + v * kLanes, total[row][v]);
    }
}

// Calls a function template with the number of rows: kRows, fewer for the last rows of a task.
#define VITRAIL_BY_ROWS(rows, function, ...) \
    switch (rows) {                          \
        case 1:                              \
            function<1>(__VA_ARGS__);        \
            break;                           \
        case 2:                              \
            function<2>(__VA_ARGS__);        \
            break;                           \
        case 3:                              \
            function<3>(__VA_ARGS__);        \
            break;                           \
        case 4:                              \
            function<4>(__VA_ARGS__);        \
            break;                           \
        case 5:                              \
            function<5>(__VA_ARGS__);        \
            break;                           \
        default:                             \
            function<kRows>(__VA_ARGS__);    \
    }

// The values of `count` columns, padded to a panel.
VITRAIL_INLINE void pad(float* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < kPanel; ++i) to[i] = i < count ? from[i] : 0.f;
}

VITRAIL_INLINE void write(float* to, const float* y, int64_t count) {
    if (count == kPanel)
        for (int64_t at = 0; at < kPanel; at += kLanes) store(to + at, load(y + at));
    else
        __builtin_memcpy(to, y, static_cast<size_t>(count) * 4);
}

// ---- linear_int8

// What the columns of a panel share.
struct Columns {
    alignas(64) float scale[kPanel], bias[kPanel];
    int64_t count;
};

// y (`count` values of a row) to codes and a scale.
template <int count>
VITRAIL_INLINE void quantize(const Linear& call, const float* y, int8_t* out, float* scale) {
    Ints sizes = {};
    Floats tops = all(-__builtin_inff());
    for (int at = 0; at < count; at += kLanes) {
        const Floats value = load(y + at);
        sizes = larger(sizes, magnitude(value));
        tops = larger(value, tops);
    }
    const int32_t size = largest(sizes);
    if (size >= kInfinity) {
        *scale = __builtin_nanf("");
        __builtin_memset(out, 0, count);
        return;
    }
    if (call.is_unsigned) {
        const float shifted = largest(tops) + kOffset;
        const float top = shifted > kTiny ? shifted : kTiny;
        const float steps = 255.f / top;
        *scale = top / 255.f;
        for (int at = 0; at < count; at += kLanes)
            codes(out + at, to_ints((load(y + at) + kOffset) * steps - 128.f));
    } else {
        const float top = as_float(size) > kTiny ? as_float(size) : kTiny;
        const float steps = 127.f / top;
        *scale = top / 127.f;
        for (int at = 0; at < count; at += kLanes) codes(out + at, to_ints(load(y + at) * steps));
    }
}

template <Activation kind, bool gated>
VITRAIL_ONCE void finish_row(const Linear& call, const Columns& columns, const int32_t* sums,
                             int64_t row, int64_t panel) {
    constexpr int kOut = gated ? kPanel / 2 : kPanel;
    alignas(64) float y[kPanel];
    const float x_scale = call.x_scale[row];
    for (int64_t at = 0; at < kPanel; at += kLanes) {
        const Floats product = floats(load(sums + at)) * x_scale * load(columns.scale + at);
        const Floats value = product + load(columns.bias + at);
        store(y + at, gated ? value : activate<kind>(value));
    }
    if constexpr (gated) {  // gate and up alternate
        alignas(64) float gates[kOut], ups[kOut];
        for (int i = 0; i < kOut; ++i) {
            gates[i] = y[2 * i];
            ups[i] = y[2 * i + 1];
        }
        for (int at = 0; at < kOut; at += kLanes)
            store(y + at, activate<kind>(load(gates + at)) * load(ups + at));
    }
    const int64_t width = gated ? call.columns / 2 : call.columns;
    const int64_t first = row * width + panel * kOut;
    if (call.codes) {
        for (int at = 0; at < kOut; at += kLanes) store(y + at, half(load(y + at)));
        quantize<kOut>(call, y, call.codes + first, call.code_scale + panel * call.rows + row);
    } else if (columns.count == kPanel) {
        for (int at = 0; at < kOut; at += kLanes) store(call.out + first + at, load(y + at));
    } else {
        const int64_t count = gated ? columns.count / 2 : columns.count;
        __builtin_memcpy(call.out + first, y, static_cast<size_t>(count) * 4);
    }
}

using Finish = void (*)(const Linear&, const Columns&, const int32_t*, int64_t, int64_t);

template <bool gated>
Finish finisher(Activation activation) {
    switch (activation) {
        case Activation::gelu:
            return finish_row<Activation::gelu, gated>;
        case Activation::gelu_tanh:
            return finish_row<Activation::gelu_tanh, gated>;
        case Activation::quick_gelu:
            return finish_row<Activation::quick_gelu, gated>;
        case Activation::relu:
            return finish_row<Activation::relu, gated>;
        case Activation::silu:
            return finish_row<Activation::silu, gated>;
        case Activation::none:
            break;
    }
    return finish_row<Activation::none, gated>;
}

void linear_rows(const Linear& call, const Task& task, const int8_t* packed, const int32_t* sums,
                 uint8_t* bytes) {
    const int64_t first = task.panel * kPanel;
    Columns columns;
    columns.count = call.columns - first < kPanel ? call.columns - first : kPanel;
    pad(columns.scale, call.weight_scale + first, columns.count);
    pad(columns.bias, call.bias + first, columns.count);
    const Finish finish =
        call.gated ? finisher<true>(call.activation) : finisher<false>(call.activation);
    alignas(64) int32_t products[kRows * kPanel];
    for (int64_t row = task.first; row < task.last; row += kRows) {
        const int64_t rows = task.last - row < kRows ? task.last - row : kRows;
        raise(bytes, call.x + row * call.depth, rows * call.depth);
        VITRAIL_BY_ROWS(rows, panel_sums, bytes, call.depth, packed, sums, products)
        for (int64_t i = 0; i < rows; ++i)
            finish(call, columns, products + i * kPanel, row + i, task.panel);
    }
}

// ---- linear_int8_grouped

// totals (rows, kPanel) = the sum over groups of x_scale times the group's exact sums.
// begin (tiles, groups, kTile): the integers that each group's sums start from.
template <int rows>
void panel_totals(const LinearGrouped& call, const uint8_t* x, const float* scales,
                  const int8_t* packed, const int32_t* begin, float* totals) {
    const int64_t groups = call.depth / call.group;
    for (int64_t tile = 0; tile < kTiles; ++tile) {
        Floats sums[rows][kVectors] = {};
        for (int64_t group = 0; group < groups; ++group) {
            Ints total[rows][kVectors];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
                const Ints start = load(begin + v * kLanes);
#pragma GCC unroll 8
                for (int row = 0; row < rows; ++row) total[row][v] = start;
            }
            begin += kTile;
            multiply<rows>(x + group * call.group, call.depth, packed, call.group, total);
            packed += call.group * kTile;
#pragma GCC unroll 8
            for (int row = 0; row < rows; ++row) {
                const Floats scale = all(scales[group * call.rows + row]);
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v)
                    sums[row][v] = fma(floats(total[row][v]), scale, sums[row][v]);
            }
        }
        for (int row = 0; row < rows; ++row)
            for (int v = 0; v < kVectors; ++v)
                store(totals + row * kPanel + tile * kTile + v * kLanes, sums[row][v]);
    }
}

VITRAIL_ONCE void finish_grouped(const LinearGrouped& call, const float* weight_scale,
                                 const float* bias, const float* scale, const float* totals,
                                 int64_t row, int64_t first, int64_t count) {
    alignas(64) float y[kPanel];
    const float* residual = nullptr;
    if (call.residual)
        residual = call.residual + first +
                   (call.residual_rows ? call.residual_rows[row] : row) * call.columns;
    alignas(64) float added[kPanel];
    if (residual && count < kPanel) {
        pad(added, residual, count);
        residual = added;
    }
    for (int64_t at = 0; at < kPanel; at += kLanes) {
        Floats value = load(totals + at) * load(weight_scale + at) + load(bias + at);
        if (call.scale) value = value * load(scale + at);
        if (residual) value = value + load(residual + at);
        store(y + at, value);
    }
    write(call.out + row * call.columns + first, y, count);
}

void grouped_rows(const LinearGrouped& call, const Task& task, const int8_t* packed,
                  const int32_t* begin, uint8_t* bytes) {
    const int64_t first = task.panel * kPanel;
    const int64_t count = call.columns - first < kPanel ? call.columns - first : kPanel;
    alignas(64) float weight_scale[kPanel], bias[kPanel], scale[kPanel] = {};
    alignas(64) float totals[kRows * kPanel];
    pad(weight_scale, call.weight_scale + first, count);
    pad(bias, call.bias + first, count);
    if (call.scale) pad(scale, call.scale + first, count);
    for (int64_t row = task.first; row < task.last; row += kRows) {
        const int64_t rows = task.last - row < kRows ? task.last - row : kRows;
        raise(bytes, call.x + row * call.depth, rows * call.depth);
        VITRAIL_BY_ROWS(rows, panel_totals, call, bytes, call.x_scale + row, packed, begin, totals)
        for (int64_t i = 0; i < rows; ++i)
            finish_grouped(call, weight_scale, bias, scale, totals + i * kPanel, row + i, first,
                           count);
    }
}

}  // namespace
}  // namespace vitrail::int8
