/* The other engines: moving tiles, elementwise functions and reductions of rows in float, sums and copies over ranks. */

enum { BLOCK = 256 }; /* floats of a row that are worked on at a time */

/* out <- in, for tiles of one type or of two. */
int copy(tile out, tile in)
{
    if (!spread(&in, &out)) return 0;
    long n = out.size[3], bytes = BYTES[out.type];
    float some[BLOCK];
    EACH_ROW(out)
    {
        char *to = row(&out, i, j, k), *from = row(&in, i, j, k);
        if (out.type != in.type) {
            for (long l = 0; l < n; l += BLOCK) {
                widen(some, from + l * in.step[3] * BYTES[in.type], in.type, in.step[3], least(BLOCK, n - l));
                narrow(to + l * out.step[3] * bytes, out.type, out.step[3], some, least(BLOCK, n - l));
            }
        } else if (n == 1 || (out.step[3] == 1 && in.step[3] == 1)) {
            memcpy(to, from, n * bytes);
        } else {
            for (long l = 0; l < n; l++) memcpy(to + l * out.step[3] * bytes, from + l * in.step[3] * bytes, bytes);
        }
    }
    return 1;
}

int constant(tile out, float value)
{
    float some[BLOCK];
    for (int l = 0; l < BLOCK; l++) some[l] = value;
    EACH_ROW(out)
        for (long l = 0; l < out.size[3]; l += BLOCK)
            narrow(row(&out, i, j, k) + l * out.step[3] * BYTES[out.type], out.type, out.step[3], some, least(BLOCK, out.size[3] - l));
    return 1;
}

/* out [r, :] <- table [rows [r] - first, :], zeros for a row that the table does not own; such a row is an error (2)
   when there is no `first`. */
int gather(tile out, tile table, tile rows, const tile *first)
{
    long origin = first ? *(const int64_t *)first->at : 0, bytes = BYTES[out.type], n = out.size[3];
    if (out.type != table.type || out.size[2] != rows.size[3] || n != table.size[3] || rows.type != I64) return 0;
    for (long r = 0; r < out.size[2]; r++) {
        int64_t at = ((const int64_t *)rows.at)[r * rows.step[3]] - origin;
        char *to = row(&out, 0, 0, r);
        if (at < 0 || at >= table.size[2]) {
            if (!first) return 2;
            for (long l = 0; l < n; l++) memset(to + l * out.step[3] * bytes, 0, bytes);
            continue;
        }
        const char *from = row(&table, 0, 0, at);
        for (long l = 0; l < n; l++) memcpy(to + l * out.step[3] * bytes, from + l * table.step[3] * bytes, bytes);
    }
    return 1;
}

static inline void widen_part(float *to, const tile *t, const char *from, long at, long n)
{
    widen(to, from + at * t->step[3] * BYTES[t->type], t->type, t->step[3], n);
}

/* out <- a function of one, two or three tiles x, y, z that broadcast to it, in float; `a` is an attribute. */
#define MAP(NAME, COUNT, VALUE) \
    int NAME(tile out, const tile *given, float a) \
    { \
        tile in[3]; \
        float x[BLOCK], y[BLOCK], z[BLOCK]; \
        (void)a, (void)y, (void)z; \
        for (int c = 0; c < COUNT; c++) { \
            in[c] = given[c]; \
            if (!spread(&in[c], &out)) return 0; \
        } \
        EACH_ROW(out) \
            for (long at = 0; at < out.size[3]; at += BLOCK) { \
                long n = least(BLOCK, out.size[3] - at); \
                widen_part(x, &in[0], row(&in[0], i, j, k), at, n); \
                if (COUNT > 1) widen_part(y, &in[1], row(&in[1], i, j, k), at, n); \
                if (COUNT > 2) widen_part(z, &in[2], row(&in[2], i, j, k), at, n); \
                for (long l = 0; l < n; l++) x[l] = VALUE; \
                narrow(row(&out, i, j, k) + at * out.step[3] * BYTES[out.type], out.type, out.step[3], x, n); \
            } \
        return 1; \
    }

static inline float clip(float x) { return x < -127 ? -127 : x > 127 ? 127 : x; }

static inline double gelu_of(float x, float by_tanh)
{
    if (by_tanh == 0) return x * (erfc(x * -0.70710678118654757) / 2);
    float inner = (float)0.7978845608028654 * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
}

MAP(map_add, 2, x[l] + y[l])
MAP(map_sub, 2, x[l] - y[l])
MAP(map_mul, 2, x[l] * y[l])
MAP(map_div, 2, x[l] / y[l])
MAP(map_tanh, 1, tanhf(x[l]))
MAP(map_mul_add, 3, x[l] * y[l] + z[l])
MAP(map_add_share, 2, x[l] + y[l] / a)
MAP(map_silu_mul, 2, x[l] / (1.0f + exponential(-x[l])) * y[l])
MAP(map_gelu, 1, (float)gelu_of(x[l], a))
MAP(map_gelu_mul, 2, (float)(gelu_of(x[l], a) * y[l]))
MAP(map_quantize, 3, clip(rintf((x[l] - z[l]) / y[l])))

/* out [..., 1] <- the mean of rows of x, 1 / sqrt(their mean square + eps), or the sum of x y. */
int reduce(tile out, tile x, const tile *other, enum reduction kind, float eps, float *work)
{
    tile y = other ? *other : x;
    if (out.size[3] != 1 || !spread(&y, &x) || !same(&out, &x, 3)) return 0;
    long n = x.size[3];
    EACH_ROW(out)
    {
        widen(work, row(&x, i, j, k), x.type, x.step[3], n);
        if (kind == DOT) widen(work + n, row(&y, i, j, k), y.type, y.step[3], n);
        const float *factor = kind == DOT ? work + n : work;
        if (kind != MEAN)
            for (long l = 0; l < n; l++) work[l] = work[l] * factor[l];
        float found = pairwise(work, n);
        if (kind != DOT) found /= (float)n;
        if (kind == INVERSE_RMS) found = 1.0f / sqrtf(found + eps);
        narrow(row(&out, i, j, k), out.type, 1, &found, 1);
    }
    return 1;
}

/* out [..., m, D] <- x with its first 2 R channels turned by cos, sin [m, R]. */
int rotary(tile out, tile x, tile cos, tile sin, long interleaved, float *work)
{
    long half = cos.size[3], width = x.size[3];
    tile rows = x;
    rows.size[3] = half;
    if (!same(&out, &x, 4) || 2 * half > width || !spread(&cos, &rows) || !spread(&sin, &rows)) return 0;
    float *c = work + width, *s = c + half;
    long one = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    EACH_ROW(out)
    {
        widen(work, row(&x, i, j, k), x.type, x.step[3], width);
        widen(c, row(&cos, i, j, k), cos.type, cos.step[3], half);
        widen(s, row(&sin, i, j, k), sin.type, sin.step[3], half);
        for (long l = 0; l < half; l++) {
            float first = work[l * one], second = work[l * one + other];
            work[l * one] = first * c[l] - second * s[l];
            work[l * one + other] = first * s[l] + second * c[l];
        }
        narrow(row(&out, i, j, k), out.type, out.step[3], work, width);
    }
    return 1;
}

static float scores(float *s, long n, const tile *added, int count, scoring how, long i, long j, long k, float *work)
{
    float slope = 0, largest[8], best = -INFINITY;
    for (int c = 0; c < count; c++) {
        int last = how.slopes && c == count - 1;
        widen(last ? &slope : work, row(&added[c], i, j, k), added[c].type, added[c].step[3], last ? 1 : n);
        if (!last)
            for (long l = 0; l < n; l++) s[l] += work[l];
    }
    for (long l = 0; l < n; l++) s[l] *= how.scale;
    if (how.clamp != 0)
        for (long l = 0; l < n; l++) s[l] = s[l] < -how.clamp ? -how.clamp : s[l] > how.clamp ? how.clamp : s[l];
    if (how.softcap != 0)
        for (long l = 0; l < n; l++) s[l] = how.softcap * tanhf(s[l] / how.softcap);
    if (how.slopes)
        for (long l = 0; l < n; l++) s[l] += slope * (float)(l - k - how.diagonal);
    for (long l = most(0, k + how.diagonal + 1); l < n; l++) s[l] = -INFINITY;
    if (how.window)
        for (long l = 0; l < least(n, k + how.diagonal - how.window + 1); l++) s[l] = -INFINITY;
    for (int l = 0; l < 8; l++) largest[l] = -INFINITY;
    long at = 0;
    for (; at + 8 <= n; at += 8)
        for (int l = 0; l < 8; l++) largest[l] = s[at + l] > largest[l] ? s[at + l] : largest[l];
    for (; at < n; at++) best = s[at] > best ? s[at] : best;
    for (int l = 0; l < 8; l++) best = largest[l] > best ? largest[l] : best;
    return best;
}

/* One block of the online softmax: outs are weights, running maximum, running sum, factor of what was summed before. */
int softmax_step(const tile *outs, tile products, const tile *given, int count, scoring how, float *work)
{
    tile added[2];
    long n = products.size[3];
    float *s = work, *rest = work + n;
    if (!same(&outs[0], &products, 4)) return 0;
    for (int o = 1; o < 4; o++)
        if (outs[o].size[3] != 1 || !same(&outs[o], &products, 3) || outs[o].type != F32) return 0;
    for (int c = 0; c < count; c++) {
        added[c] = given[c];
        if (how.slopes && c == count - 1 && given[c].size[3] != 1) return 0;
        if (!spread(&added[c], &products)) return 0;
    }
    EACH_ROW(products)
    {
        float *maximum = (float *)row(&outs[1], i, j, k), *total = (float *)row(&outs[2], i, j, k);
        float *factor = (float *)row(&outs[3], i, j, k);
        widen(s, row(&products, i, j, k), products.type, products.step[3], n);
        float best = scores(s, n, added, count, how, i, j, k, rest);
        best = best > *maximum ? best : *maximum;
        float shown = best == -INFINITY ? 0 : best;
        for (long l = 0; l < n; l++) s[l] = exponential(s[l] - shown);
        *factor = exponential(*maximum - shown);
        *total = *total * *factor + pairwise(s, n);
        *maximum = best;
        narrow(row(&outs[0], i, j, k), outs[0].type, outs[0].step[3], s, n);
    }
    return 1;
}

/* Each of `outs` <- the sum of `ins` in the order of the ranks, in float. */
int sum_ranks(const tile *outs, long count, const tile *ins, long ranks)
{
    float total[BLOCK], some[BLOCK];
    for (long r = 0; r < ranks; r++)
        if (!same(&ins[r], &outs[0], 4)) return 0;
    EACH_ROW(outs[0])
        for (long at = 0; at < outs[0].size[3]; at += BLOCK) {
            long n = least(BLOCK, outs[0].size[3] - at);
            widen_part(total, &ins[0], row(&ins[0], i, j, k), at, n);
            for (long r = 1; r < ranks; r++) {
                widen_part(some, &ins[r], row(&ins[r], i, j, k), at, n);
                for (long l = 0; l < n; l++) total[l] += some[l];
            }
            for (long o = 0; o < count; o++)
                narrow(row(&outs[o], i, j, k) + at * outs[o].step[3] * BYTES[outs[o].type], outs[o].type, outs[o].step[3], total, n);
        }
    return 1;
}

/* Every outs [rows, rank, n] <- ins [rows, n] of that rank. */
int gather_ranks(const tile *outs, const tile *ins, long ranks)
{
    for (long o = 0; o < ranks; o++)
        for (long r = 0; r < ranks; r++) {
            tile part = outs[o];
            if (part.size[0] != 1 || part.size[2] != ranks) return 0;
            part.at = row(&outs[o], 0, 0, r);
            part.size[2] = part.size[1];
            part.step[2] = part.step[1];
            part.size[1] = 1;
            if (!copy(part, ins[r])) return 0;
        }
    return 1;
}
