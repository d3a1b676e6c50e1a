/* What the code of the kernels sees: tiles of up to four axes, the primitives on them, and the state of a running kernel.

   A primitive returns 1, or 0 when the shapes of its operands do not fit each other. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef __FLT16_MAX__
#error "vacc-opt: this compiler has no _Float16 on this CPU; GCC 12 or clang 15 have it"
#endif

enum type { F32, F16, I8, I32, I64 };

/* A box: `step` counts elements; axes that are missing in front have size 1. */
typedef struct {
    char *at;
    enum type type;
    long size[4], step[4];
} tile;

static inline tile box(enum type type, char *at, long a, long b, long c, long d, long sa, long sb, long sc, long sd)
{
    return (tile){at, type, {a, b, c, d}, {sa, sb, sc, sd}};
}

static inline long least(long a, long b) { return a < b ? a : b; }
static inline long most(long a, long b) { return a > b ? a : b; }

enum reduction { MEAN, INVERSE_RMS, DOT };

/* What becomes of the products of queries and keys, and which keys row i of a tile sees: those up to i + diagonal. */
typedef struct {
    long diagonal, window;
    float scale, clamp, softcap;
    int slopes; /* the last addend is ALiBi's */
} scoring;

int copy(tile out, tile in);
int gather(tile out, tile table, tile rows, const tile *first); /* 2 for a row that the table has not */
int mma(tile out, tile x, tile w, long first, float *work);
int mma_nn(tile out, tile x, tile w, long first, float *work);
int constant(tile out, float value);
int map_add(tile out, const tile *in, float a);
int map_sub(tile out, const tile *in, float a);
int map_mul(tile out, const tile *in, float a);
int map_div(tile out, const tile *in, float a);
int map_tanh(tile out, const tile *in, float a);
int map_mul_add(tile out, const tile *in, float a);
int map_add_share(tile out, const tile *in, float a);
int map_silu_mul(tile out, const tile *in, float a);
int map_gelu(tile out, const tile *in, float by_tanh);
int map_gelu_mul(tile out, const tile *in, float by_tanh);
int map_quantize(tile out, const tile *in, float a);
int reduce(tile out, tile x, const tile *other, enum reduction kind, float eps, float *work);
int rotary(tile out, tile x, tile cos, tile sin, long interleaved, float *work);
int softmax_step(const tile *outs, tile products, const tile *given, int count, scoring how, float *work);
int sum_ranks(const tile *outs, long count, const tile *ins, long ranks);
int gather_ranks(const tile *outs, const tile *ins, long ranks);

/* One kernel on one core of one rank, while it runs. Its engines are functions that stop where their ring has no slot for
   them and go on there when called again; they are called in turn until none can move. */
enum fault { NONE, BOUNDS, OPERANDS, ROW, STUCK, UNREAD };

struct run {
    char **params;
    const int64_t **scalars;
    char *sram;
    float *work;
    long ranks, core, cores, moves, tiles, where;
    enum fault fault;
};

struct kernel {
    void (*run)(struct run *);
    int params, parallel, collective;
};

/* `where`: the number of the operation in its kernel. Always 0, to be returned. */
static int fail(struct run *r, enum fault kind, long where)
{
    r->fault = kind;
    r->where = where;
    return 0;
}

#ifdef VACC_POISON
#define POISON(at, bytes) memset(at, 0xff, bytes) /* NaN in f16 and f32 */
#else
#define POISON(at, bytes)
#endif
