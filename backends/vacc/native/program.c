/* Runs a program: calls one after the other, the ranks and cores of a call on as many threads as are asked for.

   An item is a core of a rank; items are numbered through all calls. Those of the open call may be taken; when all are
   done, the next call opens. A thread that is not running holds nothing that the others wait for, unless it was
   interrupted in an item: on a busy machine one thread goes on alone. Who finds nothing to take looks for a moment
   whether a call has opened, then sleeps. */

enum { LOOKS = 2000 };

struct fault_report {
    int64_t kind, call, where;
};

struct call {
    int64_t kernel;
    char **params;           /* of rank 0, then of rank 1, ... */
    const int64_t **scalars; /* where their values are */
};

struct team {
    const struct call *calls;
    const long *first; /* the first item of each call, and how many there are in all */
    long count, ranks, cores, sram_bytes, work_floats, numbered, open, next, done, sleeping, tiles;
    char *sram;
    float *work;
    struct fault_report *report;
    pthread_mutex_t lock;
    pthread_cond_t opened;
};

/* Waits until another call than `was` is open. */
static void await(struct team *t, long was)
{
    for (int look = 0; look < LOOKS; look++)
        if (__atomic_load_n(&t->open, __ATOMIC_ACQUIRE) != was) return;
    pthread_mutex_lock(&t->lock);
    __atomic_add_fetch(&t->sleeping, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&t->open, __ATOMIC_SEQ_CST) == was) pthread_cond_wait(&t->opened, &t->lock);
    __atomic_sub_fetch(&t->sleeping, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&t->lock);
}

/* Takes an item of call `*call`, or returns 0 when the program is over. */
static int take(struct team *t, long *call, long *item)
{
    for (;;) {
        *call = __atomic_load_n(&t->open, __ATOMIC_ACQUIRE);
        if (*call == t->count) return 0;
        *item = __atomic_load_n(&t->next, __ATOMIC_ACQUIRE);
        if (*item >= t->first[*call + 1]) await(t, *call);
        /* an item that nobody has taken keeps its call open, so it is one of this call */
        else if (__atomic_compare_exchange_n(&t->next, item, *item + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return 1;
    }
}

/* The last item of a call opens the next one, or ends the program after a fault. */
static void finish(struct team *t, long call)
{
    if (__atomic_add_fetch(&t->done, 1, __ATOMIC_ACQ_REL) != t->first[call + 1]) return;
    __atomic_store_n(&t->open, t->report->kind ? t->count : call + 1, __ATOMIC_SEQ_CST);
    if (!__atomic_load_n(&t->sleeping, __ATOMIC_SEQ_CST)) return;
    pthread_mutex_lock(&t->lock);
    pthread_cond_broadcast(&t->opened);
    pthread_mutex_unlock(&t->lock);
}

/* One core of one rank (of all, in an exchange) of a call. */
static void run_item(struct team *t, const struct call *call, long item, long thread)
{
    const struct kernel *kernel = &KERNELS[call->kernel];
    long lanes = kernel->parallel ? t->cores : 1, die = item / lanes;
    struct run r = {
        .params = call->params + die * kernel->params, .scalars = call->scalars, .ranks = t->ranks,
        .sram = t->sram + thread * t->sram_bytes, .work = t->work + thread * t->work_floats,
        .core = item % lanes, .cores = lanes};
    POISON(r.sram, t->sram_bytes);
    kernel->run(&r);
    __atomic_add_fetch(&t->tiles, r.tiles * (kernel->collective ? t->ranks : 1), __ATOMIC_RELAXED);
    if (!r.fault) return;
    pthread_mutex_lock(&t->lock);
    if (!t->report->kind) *t->report = (struct fault_report){r.fault, call - t->calls, r.where};
    pthread_mutex_unlock(&t->lock);
}

static void *work_on(void *given)
{
    struct team *t = given;
    long thread = __atomic_fetch_add(&t->numbered, 1, __ATOMIC_RELAXED), call, item;
    while (take(t, &call, &item)) {
        run_item(t, &t->calls[call], item - t->first[call], thread);
        finish(t, call);
    }
    return 0;
}

/* Returns the tile operations that were executed; `report->kind` is not 0 when one failed. */
__attribute__((visibility("default"))) int64_t vacc_run(
    const struct call *calls, int64_t count, int64_t ranks, int64_t cores, char *sram, int64_t sram_bytes, float *work,
    int64_t work_floats, int64_t threads, struct fault_report *report)
{
    long first[count + 1];
    first[0] = 0;
    for (long c = 0; c < count; c++) {
        const struct kernel *kernel = &KERNELS[calls[c].kernel];
        first[c + 1] = first[c] + (kernel->collective ? 1 : ranks) * (kernel->parallel ? cores : 1);
    }
    struct team team = {
        .calls = calls, .first = first, .count = count, .ranks = ranks, .cores = cores, .sram_bytes = sram_bytes,
        .work_floats = work_floats, .sram = sram, .work = work, .report = report,
        .lock = PTHREAD_MUTEX_INITIALIZER, .opened = PTHREAD_COND_INITIALIZER};
    pthread_t others[threads];
    long started = 1;
    report->kind = NONE;
    for (; started < threads; started++)
        if (pthread_create(&others[started], 0, work_on, &team)) break; /* fewer do as well */
    work_on(&team);
    for (long other = 1; other < started; other++) pthread_join(others[other], 0);
    return team.tiles;
}
