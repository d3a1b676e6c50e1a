/* The matrix engine: float products of tiles of any type, summed in float.

   `mma` sums over k in eight lanes, lane k mod 8, and then adds the lanes as ((0+1)+(2+3))+((4+5)+(6+7)); `mma_nn`, where
   neighbors along n lie together, sums over k one after the other. With `first` the sum of this tile is added to what
   is there. Products of f16 and int8 are exact in float. */

static inline v8 eight(const char *from, enum type type)
{
    if (type == F32) return eight_f32((const float *)from);
    if (type == F16) return eight_f16((const f16 *)from);
    return eight_i8((const int8_t *)from);
}

static inline float across(v8 l) { return ((l[0] + l[1]) + (l[2] + l[3])) + ((l[4] + l[5]) + (l[6] + l[7])); }

static inline void put(float *to, float value, long first) { *to = first ? *to + value : value; }

/* Rows of `t` as floats, padded with zeros to `width`. */
static void widen_rows(float *to, const tile *t, long width)
{
    EACH_ROW(*t)
    {
        widen(to, row(t, i, j, k), t->type, t->step[3], t->size[3]);
        for (long l = t->size[3]; l < width; l++) to[l] = 0;
        to += width;
    }
}

/* One row of x times `count` (at most 8) rows of weights, read as they lie; unrolled for each type. */
static inline __attribute__((always_inline)) void dots(
    float *to, const float *x, const char *w, enum type type, long step, long depth, long count, long first)
{
    v8 lanes[8] = {{0}};
    long whole = depth - depth % 8, bytes = BYTES[type];
    if (count == 8) {
        v8 sums[8] = {{0}}; /* registers: never indexed by a variable */
        const char *at[8];
        for (int n = 0; n < 8; n++) at[n] = w + n * step * bytes;
        for (long l = 0; l < whole; l += 8) {
            v8 factor = eight_f32(x + l);
#pragma GCC unroll 8
            for (int n = 0; n < 8; n++) sums[n] += factor * eight(at[n] + l * bytes, type);
        }
#pragma GCC unroll 8
        for (int n = 0; n < 8; n++) lanes[n] = sums[n];
    } else {
        for (long l = 0; l < whole; l += 8)
            for (int n = 0; n < count; n++) lanes[n] += eight_f32(x + l) * eight(w + (n * step + l) * bytes, type);
    }
    for (int n = 0; n < count; n++) {
        if (whole < depth) {
            float rest[8] = {0};
            widen(rest, w + (n * step + whole) * bytes, type, 1, depth - whole);
            lanes[n] += eight_f32(x + whole) * eight_f32(rest);
        }
        put(to + n, across(lanes[n]), first);
    }
}

/* Few rows of x: the weights are converted on the way, each once a row. */
static void few(float *out, long out_step, const float *x, long rows, long width, const tile *w, long first)
{
    for (long m = 0; m < rows; m++)
        for (long n = 0; n < w->size[2]; n += 8) {
            const char *from = row(w, 0, 0, n);
            long count = least(8, w->size[2] - n), step = w->step[2], depth = w->size[3];
            float *to = out + m * out_step + n;
            if (w->type == I8) dots(to, x + m * width, from, I8, step, depth, count, first);
            else if (w->type == F16) dots(to, x + m * width, from, F16, step, depth, count, first);
            else dots(to, x + m * width, from, F32, step, depth, count, first);
        }
}

/* rows x columns dot products of float rows, all in registers; rows and columns are numbers where it is called. */
static inline __attribute__((always_inline)) void block(
    float *out, long out_step, const float *x, const float *w, long width, int rows, int columns, long first)
{
    v8 lanes[4][2] = {{{0}}};
    for (long l = 0; l < width; l += 8) {
        v8 left[4], right[2];
        for (int m = 0; m < rows; m++) left[m] = eight_f32(x + m * width + l);
        for (int n = 0; n < columns; n++) right[n] = eight_f32(w + n * width + l);
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < columns; n++) lanes[m][n] += left[m] * right[n];
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) put(out + m * out_step + n, across(lanes[m][n]), first);
}

/* Many rows of x: eight rows of weights are converted at a time. */
static void many(float *out, long out_step, const float *x, long rows, long width, const tile *w, float *work, long first)
{
    for (long n = 0; n < w->size[2]; n += 8) {
        tile some = *w;
        some.at = row(w, 0, 0, n);
        some.size[2] = least(8, w->size[2] - n);
        widen_rows(work, &some, width);
        for (long m = 0; m < rows; m += 4) {
            float *to = out + m * out_step + n;
            const float *left = x + m * width;
            long columns = some.size[2], height = least(4, rows - m), c = 0;
            for (; c + 2 <= columns && height == 4; c += 2) block(to + c, out_step, left, work + c * width, width, 4, 2, first);
            for (; c < columns; c++)
                for (long r = 0; r < height; r++)
                    block(to + c + r * out_step, out_step, left + r * width, work + c * width, width, 1, 1, first);
        }
    }
}

/* Whether all rows of a product lie at one distance, `step`, from each other. */
static int even(const tile *out, long *step)
{
    long rows = 1;
    *step = 0;
    for (int axis = 2; axis >= 0; axis--) {
        if (out->size[axis] == 1) continue;
        if (!*step) *step = out->step[axis];
        else if (out->step[axis] != rows * *step) return 0;
        rows *= out->size[axis];
    }
    return 1;
}

static int product_fits(const tile *out, const tile *x, const tile *w, long n, long depth)
{
    long rows = x->size[0] * x->size[1] * x->size[2];
    return w->size[0] == 1 && w->size[1] == 1 && x->size[3] == depth && out->size[3] == n && (n <= 1 || out->step[3] == 1) &&
        out->size[0] * out->size[1] * out->size[2] == rows;
}

typedef void product(float *out, long step, const float *x, long rows, const tile *w, long first, float *work);

/* All rows at once where they lie evenly, else those of the last axis of rows. */
static void in_groups(product *multiply, tile *out, const float *x, long width, const tile *w, long first, float *work)
{
    long step, group = out->size[2];
    if (even(out, &step)) {
        multiply((float *)out->at, step, x, out->size[0] * out->size[1] * group, w, first, work);
        return;
    }
    for (long i = 0; i < out->size[0]; i++)
        for (long j = 0; j < out->size[1]; j++, x += group * width)
            multiply((float *)row(out, i, j, 0), out->step[2], x, group, w, first, work);
}

static void times_transposed(float *out, long step, const float *x, long rows, const tile *w, long first, float *work)
{
    long width = (w->size[3] + 7) / 8 * 8;
    if (rows < 4 && w->step[3] == 1) few(out, step, x, rows, width, w, first);
    else many(out, step, x, rows, width, w, work, first);
}

/* out [..., n] <- x [..., k] times w [n, k] transposed. */
int mma(tile out, tile x, tile w, long first, float *work)
{
    long rows = x.size[0] * x.size[1] * x.size[2], width = (x.size[3] + 7) / 8 * 8;
    if (!product_fits(&out, &x, &w, w.size[2], w.size[3])) return 0;
    widen_rows(work, &x, width);
    in_groups(times_transposed, &out, work, width, &w, first, work + rows * width);
    return 1;
}

/* `work` holds w in floats, in rows of a multiple of 32: 32 columns at a time stay in registers. */
static void times(float *out, long step, const float *x, long rows, const tile *w, long first, float *work)
{
    long depth = w->size[2], columns = w->size[3], width = (columns + 31) / 32 * 32;
    for (long m = 0; m < rows; m++)
        for (long n = 0; n < columns; n += 32) {
            v8 sums[4] = {{0}};
            float found[32];
            for (long l = 0; l < depth; l++)
                for (int part = 0; part < 4; part++)
                    sums[part] += x[m * depth + l] * eight_f32(work + l * width + n + 8 * part);
            memcpy(found, sums, sizeof found);
            for (long c = 0; c < least(32, columns - n); c++) put(out + m * step + n + c, found[c], first);
        }
}

/* out [..., n] <- x [..., k] times w [k, n]. */
int mma_nn(tile out, tile x, tile w, long first, float *work)
{
    long rows = x.size[0] * x.size[1] * x.size[2], depth = x.size[3];
    if (!product_fits(&out, &x, &w, w.size[3], w.size[2])) return 0;
    widen_rows(work, &x, depth);
    widen_rows(work + rows * depth, &w, (w.size[3] + 31) / 32 * 32);
    in_groups(times, &out, work, depth, &w, first, work + rows * depth);
    return 1;
}
