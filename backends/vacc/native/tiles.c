/* Rows of tiles as floats: what every primitive reads and writes.

   f16 is widened exactly and rounded once, to nearest even, when it is stored. Nothing here depends on how wide the
   vectors of a CPU are: sums are taken in eight lanes or pairwise, in an order that is written down, and products are
   not contracted into fused operations, so that every CPU gives the same bits. */

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

typedef _Float16 f16;
typedef float v8 __attribute__((vector_size(32)));
static const long BYTES[] = {4, 2, 1, 4, 8};

static inline char *row(const tile *t, long i, long j, long k)
{
    return t->at + BYTES[t->type] * (i * t->step[0] + j * t->step[1] + k * t->step[2]);
}

#define EACH_ROW(t) \
    for (long i = 0; i < (t).size[0]; i++) \
        for (long j = 0; j < (t).size[1]; j++) \
            for (long k = 0; k < (t).size[2]; k++)

/* Lets `in` be read with the indices of `out`, as numpy broadcasts; 0 when the shapes do not fit. */
static int spread(tile *in, const tile *out)
{
    for (int axis = 0; axis < 4; axis++) {
        if (in->size[axis] == out->size[axis]) continue;
        if (in->size[axis] != 1) return 0;
        in->size[axis] = out->size[axis];
        in->step[axis] = 0;
    }
    return 1;
}

static int same(const tile *a, const tile *b, int axes)
{
    for (int axis = 0; axis < axes; axis++)
        if (a->size[axis] != b->size[axis]) return 0;
    return 1;
}

static inline v8 eight_f16(const f16 *from)
{
#if defined(__AVX2__) && defined(__F16C__)
    return (v8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    v8 to;
    for (int l = 0; l < 8; l++) to[l] = (float)from[l];
    return to;
#endif
}

static inline v8 eight_i8(const int8_t *from)
{
#if defined(__AVX2__)
    return (v8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    v8 to;
    for (int l = 0; l < 8; l++) to[l] = (float)from[l];
    return to;
#endif
}

static inline v8 eight_f32(const float *from)
{
    v8 to;
    memcpy(&to, from, sizeof to);
    return to;
}

/* n elements as floats. */
static void widen(float *restrict to, const char *from, enum type type, long step, long n)
{
    long l = 0;
    if (step == 0) {
        float one;
        if (n > 0) {
            widen(&one, from, type, 1, 1);
            for (; l < n; l++) to[l] = one;
        }
    } else if (type == F32) {
        const float *given = (const float *)from;
        if (step == 1) memcpy(to, given, n * sizeof *to);
        else for (; l < n; l++) to[l] = given[l * step];
    } else if (type == F16) {
        const f16 *given = (const f16 *)from;
        if (step == 1)
            for (; l + 8 <= n; l += 8) {
                v8 some = eight_f16(given + l);
                memcpy(to + l, &some, sizeof some);
            }
        for (; l < n; l++) to[l] = (float)given[l * step];
    } else if (type == I8) {
        const int8_t *given = (const int8_t *)from;
        if (step == 1) for (; l < n; l++) to[l] = (float)given[l];
        else for (; l < n; l++) to[l] = (float)given[l * step];
    } else if (type == I32) {
        for (; l < n; l++) to[l] = (float)((const int32_t *)from)[l * step];
    } else {
        for (; l < n; l++) to[l] = (float)((const int64_t *)from)[l * step];
    }
}

/* n floats as elements: f16 is rounded to nearest even, integers are cut off. */
static void narrow(char *to, enum type type, long step, const float *restrict from, long n)
{
    long l = 0;
    if (type == F32) {
        float *given = (float *)to;
        if (step == 1) memcpy(given, from, n * sizeof *from);
        else for (; l < n; l++) given[l * step] = from[l];
    } else if (type == F16) {
        f16 *given = (f16 *)to;
#if defined(__AVX2__) && defined(__F16C__)
        if (step == 1)
            for (; l + 8 <= n; l += 8) {
                __m128i some = _mm256_cvtps_ph(_mm256_loadu_ps(from + l), _MM_FROUND_TO_NEAREST_INT);
                _mm_storeu_si128((__m128i *)(given + l), some);
            }
#endif
        for (; l < n; l++) given[l * step] = (f16)from[l];
    } else if (type == I8) {
        for (; l < n; l++) ((int8_t *)to)[l * step] = (int8_t)(int32_t)from[l];
    } else if (type == I32) {
        for (; l < n; l++) ((int32_t *)to)[l * step] = (int32_t)from[l];
    } else {
        for (; l < n; l++) ((int64_t *)to)[l * step] = (int64_t)from[l];
    }
}

/* The sum of n floats in numpy's order: halves down to 128 numbers, those in eight lanes. */
static float pairwise(const float *from, long n)
{
    if (n < 8) {
        float total = 0;
        for (long l = 0; l < n; l++) total += from[l];
        return total;
    }
    if (n <= 128) {
        v8 lanes = eight_f32(from);
        long l = 8;
        for (; l + 8 <= n; l += 8) lanes += eight_f32(from + l);
        float total = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
        for (; l < n; l++) total += from[l];
        return total;
    }
    long half = n / 2 - n / 2 % 8;
    return pairwise(from, half) + pairwise(from + half, n - half);
}

/* e^x to two units in the last place: x = n ln 2 + r, the series of e^r, times 2^n in two steps (the result may be
   denormal). Without branches, so that loops over it become vector code. */
static inline float exponential(float x)
{
    const float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f, magic = 0x1.8p23f;
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    float shifted = x * 0x1.715476p0f + magic, n = shifted - magic;
    uint32_t bits, first, second;
    float scale_first, scale_second;
    memcpy(&bits, &shifted, 4);
    bits -= 0x4b400000;
    first = (uint32_t)((int32_t)bits >> 1);
    second = bits - first;
    first = (first + 127) << 23;
    second = (second + 127) << 23;
    memcpy(&scale_first, &first, 4);
    memcpy(&scale_second, &second, 4);
    float r = (x - n * ln2_high) - n * ln2_low;
    float series = 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * (r * r) + r;
    return ((1.0f + series) * scale_first) * scale_second;
}
