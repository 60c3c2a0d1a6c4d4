// Vectors of float32, as long as the processor has them, and numbers in memory.

#include <stdint.h>

#if defined(__AVX512F__)
enum { VECTOR = 16 };
#elif defined(__AVX__)
enum { VECTOR = 8 };
#else
enum { VECTOR = 4 };
#endif
enum { FLOAT32 = 0, BFLOAT16 = 1 };

typedef float vec __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef int32_t integer __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef uint32_t word __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef uint16_t half __attribute__((vector_size(2 * VECTOR), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }

INLINE vec read(const char *p, long k, int type) {
    if (type == FLOAT32) return load((const float *)p + k);
    word bits = __builtin_convertvector(*(const half *)((const uint16_t *)p + k), word) << 16;
    return (vec)bits;
}

INLINE void write(char *p, long k, vec v, int type) {
    if (type == FLOAT32) { store((float *)p + k, v); return; }
    word bits = (word)v, even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    word nan = (word)(v != v);  // rounding could carry one into an infinity
    *(half *)((uint16_t *)p + k) =
        __builtin_convertvector((even & ~nan) | (nan & ((bits >> 16) | 0x40)), half);
}
