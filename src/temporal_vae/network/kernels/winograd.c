// Convolutions by Winograd's minimal filtering, of frames whose channels lie together.
//
// A result of r taps at two neighbouring places takes r + 1 multiplications in place of 2 r: inputs
// are added up before, products after (Lavin and Gray 2016, arXiv 1509.09308). Along each of three
// axes (time, rows, columns) a kernel does one of
//   ONE      one tap: a product for each place
//   THREE    three taps, two places: 4 products of 4 inputs
//   DOUBLED  three taps over inputs that are each repeated twice, both places of one input: 3
//            products of 3 inputs
// The products of one place of the transform, over all tiles, are a matrix product.
//
// Names: `tile` what is computed together of one place in time and space, `place` one product of a
// tile, `panel` LANES output channels. Sizes and strides count numbers, not bytes.
//
// The gradient of a weight goes the same way back: what is given comes in where results went out,
// the matrix product is one over all tiles, and its places are added up to taps.

#include <string.h>

#include "vectors.h"

enum { ROWS = VECTOR == 16 ? 12 : 6 };  // of a product of matrices: as registers hold them
enum { LANES = 2 * VECTOR, ONE = 0, THREE = 1, DOUBLED = 2, AXES = 3, MOST = 64 };
enum { APART = 16 };  // between places, which would meet in the cache at a power of two
enum { CHAIN = 64 };  // products added in a row: long sums round more

static const int READ[] = {1, 4, 3};    // inputs of a tile along an axis, and products
static const int GIVEN[] = {1, 2, 2};   // results of a tile
static const int STEP[] = {1, 2, 1};    // inputs from one tile to the next
static const int TAPS[] = {1, 3, 3};

extern int omp_get_thread_num(void);

// Along one axis, for numbers `s` apart ----------------------------------------------------------

INLINE void inputs(vec *d, int s, int kind) {
    if (kind == THREE) {
        vec a = d[0], b = d[s], c = d[2 * s], e = d[3 * s];
        d[0] = a - c; d[s] = b + c; d[2 * s] = c - b; d[3 * s] = b - e;
    } else if (kind == DOUBLED) {
        d[0] -= d[s]; d[2 * s] -= d[s];
    }
}

INLINE void results(vec *m, int s, int kind) {
    if (kind == THREE) {
        vec b = m[s], c = m[2 * s];
        m[0] = m[0] + b + c; m[s] = b - c - m[3 * s];
    } else if (kind == DOUBLED) {
        m[0] += m[s]; m[s] += m[2 * s];
    }
}

INLINE void given(vec *m, int s, int kind) {  // `results` the other way
    if (kind == THREE) {
        vec a = m[0], b = m[s];
        m[s] = a + b; m[2 * s] = a - b; m[3 * s] = -b;
    } else if (kind == DOUBLED) {
        m[2 * s] = m[s]; m[s] += m[0];
    }
}

INLINE void taps(vec *g, int s, int kind) {
    if (kind == THREE) {
        vec ends = g[0] + g[2 * s], middle = g[s];
        g[3 * s] = g[2 * s]; g[s] = .5f * (ends + middle); g[2 * s] = .5f * (ends - middle);
    } else if (kind == DOUBLED) {
        g[s] = g[0] + g[s] + g[2 * s];
    }
}

// Along columns, rows and time of v[time][row][column], whose strides are those of READ. Lines of
// numbers go in, n along each axis, and m come out.
#define OVER(along, v, t, r, c, n, m)                                                              \
    do {                                                                                           \
        UNROLL for (int i = 0; i < n[t] * n[r]; i++)                                               \
            along(v + (i / n[r] * READ[r] + i % n[r]) * READ[c], 1, c);                            \
        UNROLL for (int i = 0; i < n[t] * m[c]; i++)                                               \
            along(v + i / m[c] * READ[r] * READ[c] + i % m[c], READ[c], r);                        \
        UNROLL for (int i = 0; i < m[r] * m[c]; i++)                                               \
            along(v + i / m[c] * READ[c] + i % m[c], READ[r] * READ[c], t);                        \
    } while (0)

// The product of matrices -------------------------------------------------------------------------

// ROWS rows of a times b[k][LANES] -> c (rows `kc` apart), or added to it. A row of a is `row` from
// the next, and a number of it `step`; a row of b `kb`.
INLINE void product(long k, const float *a, long row, long step, const float *b, long kb,
                    float *c, long kc, int add) {
    vec s[ROWS][2];
    UNROLL for (int i = 0; i < ROWS; i++) s[i][0] = s[i][1] = (vec){0};
    for (; k > 0; k--, a += step, b += kb) {
        vec b0 = load(b), b1 = load(b + VECTOR);
        UNROLL for (int i = 0; i < ROWS; i++) {
            float each = a[i * row];
            s[i][0] += each * b0;
            s[i][1] += each * b1;
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) {
        float *to = c + i * kc;
        if (add) s[i][0] += load(to), s[i][1] += load(to + VECTOR);
        store(to, s[i][0]);
        store(to + VECTOR, s[i][1]);
    }
}

static void over_channels(long k, const float *a, long ka, const float *b, float *c, long kc,
                          int add) {
    product(k, a, ka, 1, b, LANES, c, kc, add);
}

static void over_tiles(long k, const float *a, long ka, const float *b, long kb, float *c,
                       long kc) {
    product(k, a, 1, ka, b, kb, c, kc, 1);
}

// Weights -----------------------------------------------------------------------------------------

typedef struct {
    int32_t kind[AXES];
    int64_t in, out, taps;          // channels; kernels that are added up
    int64_t weight[2 + AXES];       // strides: output channel, input channel, time, row, column
} Shape;

INLINE int places(const int32_t *kind) { return READ[kind[0]] * READ[kind[1]] * READ[kind[2]]; }
INLINE long panels(long out) { return (out + LANES - 1) / LANES; }

// u[place][panel][input channel][LANES] of one kernel w, whose channels go on where it has no more.
INLINE void transformed(const float *w, const Shape *s, float *u, int t, int r, int c) {
    long all = panels(s->out), in = s->in, apart = all * in * LANES;
    const int64_t *by = s->weight;
#pragma omp for schedule(static)
    for (long i = 0; i < all * in; i++) {
        float g[MOST][LANES] __attribute__((aligned(64)));
        long first = i / in * LANES, lanes = s->out - first < LANES ? s->out - first : LANES;
        const float *from = w + first * by[0] + i % in * by[1];
        for (int q = 0; q < TAPS[t] * TAPS[r] * TAPS[c]; q++) {
            int qt = q / (TAPS[r] * TAPS[c]), qr = q / TAPS[c] % TAPS[r], qc = q % TAPS[c];
            float *to = g[(qt * READ[r] + qr) * READ[c] + qc];
            const float *each = from + qt * by[2] + qr * by[3] + qc * by[4];
            for (long o = 0; o < LANES; o++) to[o] = o < lanes ? each[o * by[0]] : 0;
        }
        for (int side = 0; side < LANES; side += VECTOR) {
            vec v[MOST];
            UNROLL for (int q = 0; q < READ[t] * READ[r] * READ[c]; q++) v[q] = load(g[q] + side);
            OVER(taps, v, t, r, c, TAPS, READ);
            UNROLL for (int q = 0; q < READ[t] * READ[r] * READ[c]; q++)
                store(u + q * apart + i * LANES + side, v[q]);
        }
    }
}

// Tiles -------------------------------------------------------------------------------------------

typedef struct {
    int64_t groups, height, width;          // of what is read; a group: frames of one tile
    int64_t row, pixel, pad;                // strides; rows and columns of zeros around a frame
    int64_t out_height, out_width, out_row, out_pixel;
    int64_t tiles, threads;                 // tiles of a block
    int32_t type;
} Frames;

INLINE void gather(const char *const *frames, const Frames *f, const Shape *s, const char *zeros,
                   long ty, long tx, float *v, long apart, int t, int r, int c, int type) {
    int bytes = type == FLOAT32 ? 4 : 2;
    const char *from[MOST];
    for (int q = 0; q < READ[t] * READ[r] * READ[c]; q++) {
        const char *frame = frames[q / (READ[r] * READ[c])];
        long y = ty * STEP[r] + q / READ[c] % READ[r] - (r == ONE ? 0 : f->pad);
        long x = tx * STEP[c] + q % READ[c] - (c == ONE ? 0 : f->pad);
        int inside = frame && y >= 0 && y < f->height && x >= 0 && x < f->width;
        from[q] = inside ? frame + (y * f->row + x * f->pixel) * bytes : zeros;
    }
    for (long k = 0; k < s->in; k += VECTOR) {
        vec d[MOST];
        UNROLL for (int q = 0; q < READ[t] * READ[r] * READ[c]; q++) d[q] = read(from[q], k, type);
        OVER(inputs, d, t, r, c, READ, READ);
        UNROLL for (int q = 0; q < READ[t] * READ[r] * READ[c]; q++) store(v + q * apart + k, d[q]);
    }
}

// Where the results of a tile are, or `missing`.
INLINE void found(char *const *frames, const Frames *f, char *missing, long ty, long tx, char **to,
                  int t, int r, int c, int type) {
    for (int q = 0; q < GIVEN[t] * GIVEN[r] * GIVEN[c]; q++) {
        char *frame = frames[q / (GIVEN[r] * GIVEN[c])];
        long y = ty * GIVEN[r] + q / GIVEN[c] % GIVEN[r], x = tx * GIVEN[c] + q % GIVEN[c];
        int inside = frame && y < f->out_height && x < f->out_width;
        long there = y * f->out_row + x * f->out_pixel;
        to[q] = inside ? frame + there * (type == FLOAT32 ? 4 : 2) : missing;
    }
}

// Of the result q of a tile, its place among what is read.
INLINE int spread(int q, int r, int c) {
    int qt = q / (GIVEN[r] * GIVEN[c]), qr = q / GIVEN[c] % GIVEN[r], qc = q % GIVEN[c];
    return (qt * READ[r] + qr) * READ[c] + qc;
}

INLINE void scatter(char *const *frames, const Frames *f, const Shape *s, const float *bias,
                    long ty, long tx, const float *m, long apart, int t, int r, int c, int type) {
    char *to[8];
    found(frames, f, NULL, ty, tx, to, t, r, c, type);
    for (long k = 0; k < s->out; k += VECTOR) {
        vec d[MOST], b = bias ? load(bias + k) : (vec){0};
        UNROLL for (int q = 0; q < READ[t] * READ[r] * READ[c]; q++) d[q] = load(m + q * apart + k);
        OVER(results, d, t, r, c, READ, GIVEN);
        UNROLL for (int q = 0; q < GIVEN[t] * GIVEN[r] * GIVEN[c]; q++)
            if (to[q]) write(to[q], k, d[spread(q, r, c)] + b, type);
    }
}

INLINE void gather_given(char *const *frames, const Frames *f, const Shape *s, char *zeros,
                         long ty, long tx, float *m, long apart, int t, int r, int c, int type) {
    char *from[8];
    found(frames, f, zeros, ty, tx, from, t, r, c, type);
    for (long k = 0; k < s->out; k += VECTOR) {
        vec d[MOST];
        UNROLL for (int q = 0; q < GIVEN[t] * GIVEN[r] * GIVEN[c]; q++)
            d[spread(q, r, c)] = read(from[q], k, type);
        OVER(given, d, t, r, c, GIVEN, READ);
        UNROLL for (int q = 0; q < READ[t] * READ[r] * READ[c]; q++) store(m + q * apart + k, d[q]);
    }
}

INLINE void blocks(const char *const *x, char *const *y, const float *u, const float *bias,
                   float *space, const Shape *s, const Frames *f, int t, int r, int c, int type) {
    long across = (f->out_width + GIVEN[c] - 1) / GIVEN[c];
    long each = (f->out_height + GIVEN[r] - 1) / GIVEN[r] * across, all = f->groups * each;
    long sides = panels(s->out), wide = sides * LANES, in = s->in, block = f->tiles;
    int count = READ[t] * READ[r] * READ[c];
    long v_apart = block * in + APART, m_apart = block * wide + APART;
    float *v = space, *m = v + count * v_apart, *zeros = m + count * m_apart;
    memset(zeros, 0, in * sizeof *zeros);
#pragma omp for schedule(dynamic)
    for (long begin = 0; begin < all; begin += block) {
        long here = all - begin < block ? all - begin : block;
        for (long tap = 0; tap < s->taps; tap++) {
            for (long i = 0; i < here; i++) {
                long tile = begin + i, group = tile / each;
                gather(x + (group * s->taps + tap) * READ[t], f, s, (char *)zeros,
                       tile % each / across, tile % across, v + i * in, v_apart, t, r, c, type);
            }
            for (long q = 0; q < count * sides; q++) {
                const float *b = u + (tap * count * sides + q) * in * LANES;
                const float *a = v + q / sides * v_apart;
                float *to = m + q / sides * m_apart + q % sides * LANES;
                for (long k = 0; k < in; k += CHAIN) {
                    long chain = in - k < CHAIN ? in - k : CHAIN;
                    for (long i = 0; i < here; i += ROWS)
                        over_channels(chain, a + i * in + k, in, b + k * LANES, to + i * wide, wide,
                                      tap + k > 0);
                }
            }
        }
        for (long i = 0; i < here; i++) {
            long tile = begin + i, group = tile / each;
            scatter(y + group * GIVEN[t], f, s, bias, tile % each / across, tile % across,
                    m + i * wide, m_apart, t, r, c, type);
        }
    }
}

// Adds to u[place][input channel][output channel], input channels filled up to a multiple of 12,
// output channels to one of 32: what is added there is of no use, and nobody looks at it. All
// threads transform a block of tiles, then each takes places of the product: sums do not depend on
// how many threads there are.
INLINE void weight_blocks(const char *const *x, char *const *y, float *u, float *space,
                          const Shape *s, const Frames *f, int t, int r, int c, int type) {
    long across = (f->out_width + GIVEN[c] - 1) / GIVEN[c];
    long each = (f->out_height + GIVEN[r] - 1) / GIVEN[r] * across, all = f->groups * each;
    long tall = (s->in + 11) / 12 * 12, wide = (s->out + 31) / 32 * 32, sides = panels(s->out);
    long v_row = tall + APART, m_row = wide + APART, block = f->tiles;
    int count = READ[t] * READ[r] * READ[c];
    long v_apart = block * v_row + APART, m_apart = block * m_row + APART;
    float *v = space, *m = v + count * v_apart, *zeros = m + count * m_apart;
    for (long begin = 0; begin < all; begin += block) {
        long here = all - begin < block ? all - begin : block;
#pragma omp for schedule(static)
        for (long i = 0; i < here; i++) {
            long tile = begin + i, group = tile / each, ty = tile % each / across, tx = tile % across;
            gather(x + group * READ[t], f, s, (char *)zeros, ty, tx, v + i * v_row, v_apart,
                   t, r, c, type);
            gather_given(y + group * GIVEN[t], f, s, (char *)zeros, ty, tx, m + i * m_row, m_apart,
                         t, r, c, type);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < count * sides; i++) {
            long q = i / sides, out = i % sides * LANES;
            for (long k = 0; k < here; k += CHAIN) {
                long chain = here - k < CHAIN ? here - k : CHAIN;
                for (long row = 0; row < s->in; row += ROWS)
                    over_tiles(chain, v + q * v_apart + k * v_row + row, v_row,
                               m + q * m_apart + k * m_row + out, m_row,
                               u + (q * tall + row) * wide + out, wide);
            }
        }
    }
}

// What is called ----------------------------------------------------------------------------------

// The kinds there are: each is compiled by itself.
#define EACH_KIND(use)                                                                             \
    use(ONE, THREE, THREE) use(ONE, DOUBLED, DOUBLED) use(THREE, ONE, ONE) use(THREE, THREE, THREE)

void winograd_transform(const float *const *w, float *u, const Shape *s, int32_t threads) {
    long apart = places(s->kind) * panels(s->out) * s->in * LANES;
#pragma omp parallel num_threads(threads)
    for (long tap = 0; tap < s->taps; tap++) {
#define USE(t, r, c)                                                                               \
    if (s->kind[0] == t && s->kind[1] == r && s->kind[2] == c)                                     \
        transformed(w[tap], s, u + tap * apart, t, r, c);
        EACH_KIND(USE)
#undef USE
    }
}

// `each`: numbers of space that a thread works in.
void winograd(const char *const *x, char *const *y, const float *u, const float *bias,
              float *space, int64_t each, const Shape *s, const Frames *f) {
#pragma omp parallel num_threads(f->threads)
    {
        float *own = space + omp_get_thread_num() * each;
#define USE(t, r, c)                                                                               \
    if (s->kind[0] == t && s->kind[1] == r && s->kind[2] == c) {                                   \
        if (f->type == FLOAT32) blocks(x, y, u, bias, own, s, f, t, r, c, FLOAT32);                \
        else blocks(x, y, u, bias, own, s, f, t, r, c, BFLOAT16);                                  \
    }
        EACH_KIND(USE)
#undef USE
    }
}

// `space` ends with zeros, at least as many as there are channels on the side that has more.
void winograd_weight(const char *const *x, char *const *y, float *u, float *space, const Shape *s,
                     const Frames *f) {
#pragma omp parallel num_threads(f->threads)
    {
#define USE(t, r, c)                                                                               \
    if (s->kind[0] == t && s->kind[1] == r && s->kind[2] == c) {                                   \
        if (f->type == FLOAT32) weight_blocks(x, y, u, space, s, f, t, r, c, FLOAT32);             \
        else weight_blocks(x, y, u, space, s, f, t, r, c, BFLOAT16);                               \
    }
        EACH_KIND(USE)
#undef USE
    }
}
