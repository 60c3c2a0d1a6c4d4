// Norms whose sums are known or are those of one pixel, and SiLU, in one pass over frames whose
// channels lie together.

#include <math.h>
#include <stddef.h>

#include "vectors.h"

enum { PIXELS = 64 };  // that a thread takes at a time

INLINE vec chosen(integer where, vec a, vec b) {
    return (vec)(((integer)a & where) | ((integer)b & ~where));
}

// e^x, to a unit in the last place or two, and infinite above 88: 2^n e^r, e^r by a polynomial (Cephes, Moshier).
INLINE vec exponential(vec x) {
    integer large = x > 88.f;
    x = chosen(x < -87.f, (vec){0} - 87.f, chosen(large, (vec){0} + 88.f, x));
    vec n = (x * 1.44269504f + 12582912.f) - 12582912.f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return chosen(large, (vec){0} + INFINITY, p * (vec)((__builtin_convertvector(n, integer) + 127) << 23));
}

INLINE vec silu(vec x) { return x / (1.f + exponential(-x)); }

INLINE float total(vec x) {
    float sum = 0;
    for (int i = 0; i < VECTOR; i++) sum += x[i];
    return sum;
}

// (x - mean) * scale + shift, of each channel.
INLINE void shifted(const char *x, char *y, long channels, const float *mean, const float *scale,
                    const float *shift, int with_silu, int type) {
    for (long k = 0; k < channels; k += VECTOR) {
        vec v = (read(x, k, type) - load(mean + k)) * load(scale + k) + load(shift + k);
        write(y, k, with_silu ? silu(v) : v, type);
    }
}

// x by its length over the channels, or `shortest`, times `gain`.
INLINE void by_length(const char *x, char *y, long channels, const float *gain, float shortest,
                      int with_silu, int type) {
    vec squares = {0};
    for (long k = 0; k < channels; k += VECTOR) {
        vec v = read(x, k, type);
        squares += v * v;
    }
    float length = sqrtf(total(squares)), times = 1 / (length < shortest ? shortest : length);
    for (long k = 0; k < channels; k += VECTOR) {
        vec v = read(x, k, type) * times * load(gain + k);
        write(y, k, with_silu ? silu(v) : v, type);
    }
}

// x less its mean over the channels, by its standard deviation, times `gain`, plus `shift`.
INLINE void by_position(const char *x, char *y, long channels, const float *gain,
                        const float *shift, float eps, int with_silu, int type) {
    vec sums = {0}, squares = {0};
    for (long k = 0; k < channels; k += VECTOR) sums += read(x, k, type);
    float mean = total(sums) / (float)channels;
    for (long k = 0; k < channels; k += VECTOR) {
        vec v = read(x, k, type) - mean;
        squares += v * v;
    }
    float times = 1 / sqrtf(total(squares) / (float)channels + eps);
    for (long k = 0; k < channels; k += VECTOR) {
        vec v = (read(x, k, type) - mean) * times * load(gain + k) + load(shift + k);
        write(y, k, with_silu ? silu(v) : v, type);
    }
}

enum { STRIP = 4 };   // vectors of columns that are added up side by side
enum { CHAIN = 16 };  // numbers added in a row: long sums round more

// Adds rows of x, `apart` from one another, to sums; or the squares of their distances to `mean`.
INLINE void add_rows(const float *x, long rows, long apart, const vec *mean, vec *sum, int vectors) {
    for (long row = 0; row < rows; row += CHAIN) {
        vec part[STRIP];
        for (int i = 0; i < vectors; i++) part[i] = (vec){0};
        for (long r = row; r < rows && r < row + CHAIN; r++)
            for (int i = 0; i < vectors; i++) {
                vec v = load(x + r * apart + i * VECTOR);
                if (mean) v = (v - mean[i]) * (v - mean[i]);
                part[i] += v;
            }
        for (int i = 0; i < vectors; i++) sum[i] += part[i];
    }
}

// Mean and variance of some columns of rows, in two passes.
INLINE void strip_moments(const float *x, long rows, long apart, float *mean, float *variance,
                          int vectors) {
    vec m[STRIP], s[STRIP];
    for (int i = 0; i < vectors; i++) m[i] = s[i] = (vec){0};
    add_rows(x, rows, apart, NULL, m, vectors);
    for (int i = 0; i < vectors; i++) m[i] /= (float)rows;
    add_rows(x, rows, apart, m, s, vectors);
    for (int i = 0; i < vectors; i++) {
        store(mean + i * VECTOR, m[i]);
        store(variance + i * VECTOR, s[i] / (float)rows);
    }
}

#define BYTES(type) ((type) == FLOAT32 ? 4 : 2)
#define EACH(use, with_silu, type)                                                                 \
    do {                                                                                           \
        if (type == FLOAT32) { if (with_silu) { use(1, FLOAT32); } else { use(0, FLOAT32); } }     \
        else { if (with_silu) { use(1, BFLOAT16); } else { use(0, BFLOAT16); } }                   \
    } while (0)

#define FOR_PIXELS(use)                                                                            \
    do {                                                                                           \
        long apart = channels * BYTES(type);                                                       \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                          \
        for (long begin = 0; begin < pixels; begin += PIXELS)                                      \
            for (long p = begin; p < pixels && p < begin + PIXELS; p++) EACH(use, with_silu, type); \
    } while (0)

void norm_shifted(const char *x, char *y, int64_t pixels, int64_t channels, const float *mean,
                  const float *scale, const float *shift, int32_t with_silu, int32_t type,
                  int32_t threads) {
#define USE(s, t) shifted(x + p * apart, y + p * apart, channels, mean, scale, shift, s, t)
    FOR_PIXELS(USE);
#undef USE
}

void norm_by_length(const char *x, char *y, int64_t pixels, int64_t channels, const float *gain,
                    float shortest, int32_t with_silu, int32_t type, int32_t threads) {
#define USE(s, t) by_length(x + p * apart, y + p * apart, channels, gain, shortest, s, t)
    FOR_PIXELS(USE);
#undef USE
}

void norm_by_position(const char *x, char *y, int64_t pixels, int64_t channels, const float *gain,
                      const float *shift, float eps, int32_t with_silu, int32_t type,
                      int32_t threads) {
#define USE(s, t) by_position(x + p * apart, y + p * apart, channels, gain, shift, eps, s, t)
    FOR_PIXELS(USE);
#undef USE
}

// Of each of the columns of x, which are a multiple of VECTOR.
void norm_moments(const float *x, int64_t rows, int64_t columns, float *mean, float *variance,
                  int32_t threads) {
    enum { WIDE = STRIP * VECTOR };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long c = 0; c < columns; c += WIDE)
        if (columns - c >= WIDE)
            strip_moments(x + c, rows, columns, mean + c, variance + c, STRIP);
        else
            strip_moments(x + c, rows, columns, mean + c, variance + c, (columns - c) / VECTOR);
}
