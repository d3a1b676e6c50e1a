/* Runs a program: calls one after the other, the ranks and cores of a call on as many threads as are asked for.

   Threads take the next core that nobody has taken, and meet after every call: they look for a moment whether the others
   have come, then sleep, so that a busy machine does not spend its time on waiting. */

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
    long count, ranks, cores, sram_bytes, work_floats, threads, numbered, next, arrived, met, stop, tiles;
    char *sram;
    float *work;
    struct fault_report *report;
    pthread_mutex_t lock;
    pthread_cond_t all_here;
};

/* Waits until all threads of the team are here; the last one lets `next` start again, and says whether to stop: were
   `report` read after the meeting, a thread that went on could change it for those still to read it. */
static void meet(struct team *t)
{
    long before = __atomic_load_n(&t->met, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&t->arrived, 1, __ATOMIC_ACQ_REL) == t->threads) {
        t->arrived = t->next = 0;
        t->stop = t->report->kind != NONE;
        pthread_mutex_lock(&t->lock);
        __atomic_store_n(&t->met, before + 1, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&t->all_here);
        pthread_mutex_unlock(&t->lock);
        return;
    }
    for (int look = 0; look < LOOKS; look++)
        if (__atomic_load_n(&t->met, __ATOMIC_ACQUIRE) != before) return;
    pthread_mutex_lock(&t->lock);
    while (__atomic_load_n(&t->met, __ATOMIC_ACQUIRE) == before) pthread_cond_wait(&t->all_here, &t->lock);
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
    long thread = __atomic_fetch_add(&t->numbered, 1, __ATOMIC_RELAXED);
    meet(t);
    for (long c = 0; c < t->count; c++) {
        const struct kernel *kernel = &KERNELS[t->calls[c].kernel];
        long items = (kernel->collective ? 1 : t->ranks) * (kernel->parallel ? t->cores : 1), item;
        while ((item = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < items) run_item(t, &t->calls[c], item, thread);
        meet(t);
        if (t->stop) break;
    }
    return 0;
}

/* Returns the tile operations that were executed; `report->kind` is not 0 when one failed. */
__attribute__((visibility("default"))) int64_t vacc_run(
    const struct call *calls, int64_t count, int64_t ranks, int64_t cores, char *sram, int64_t sram_bytes, float *work,
    int64_t work_floats, int64_t threads, struct fault_report *report)
{
    struct team team = {
        .calls = calls, .count = count, .ranks = ranks, .cores = cores, .sram_bytes = sram_bytes,
        .work_floats = work_floats, .threads = threads, .sram = sram, .work = work, .report = report,
        .lock = PTHREAD_MUTEX_INITIALIZER, .all_here = PTHREAD_COND_INITIALIZER};
    pthread_t others[threads];
    long started = 1;
    report->kind = NONE;
    for (; started < threads; started++)
        if (pthread_create(&others[started], 0, work_on, &team)) break;
    if (started < threads) { /* those that are here already wait in their first meeting */
        pthread_mutex_lock(&team.lock);
        __atomic_store_n(&team.threads, started, __ATOMIC_RELEASE);
        pthread_mutex_unlock(&team.lock);
    }
    work_on(&team);
    for (long other = 1; other < started; other++) pthread_join(others[other], 0);
    return team.tiles;
}
