/*
 * The begin of every function of the NVML double: it reads the state, applies a forced failure, and finds the GPU.
 *
 * "fail FUNCTION CODE [UUID]" in the state makes a function return CODE, only for the GPU with that UUID if there is one,
 * or block while CODE is "hang". For a GPU with "lost 1" every function returns GPU_IS_LOST.
 */
#ifndef NVML_CALL_H
#define NVML_CALL_H
#include "gpu_state.h"

#include <poll.h>
#include <stdatomic.h>
#include <stddef.h>

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15, MEMORY = 20, VERSION_MISMATCH = 25,
};
enum { MAX_MIG = 7, HANDLES_PER_GPU = 1 + MAX_MIG, HANG_POLL_MS = 5 };

/* A handle is an address in here: the GPU itself at [gpu][0], its n-th MIG device at [gpu][n + 1]. */
typedef char *device;
extern __attribute__((visibility("hidden"))) char handles[STATE_MAX_GPUS][HANDLES_PER_GPU];
extern __attribute__((visibility("hidden"))) atomic_int init_count;

/* ---- the begin of a call: state, forced failures, lost GPUs ---- */

/* The forced code for this function and, if given, this UUID; -1 for "hang", 0 for none. */
static inline int forced(const struct state *state, const char *function, const char *uuid) {
    char name[96], code[16], rule_uuid[96];
    int after = -1;
    for (const char *rule; (rule = next_value(state, &state->machine, "fail", &after));) {
        *rule_uuid = '\0';
        if (sscanf(rule, "%95s %15s %95s", name, code, rule_uuid) < 2 || strcmp(name, function) != 0) continue;
        if (*rule_uuid && (!uuid || strcmp(rule_uuid, uuid) != 0)) continue;
        return strcmp(code, "hang") ? atoi(code) : -1;
    }
    return SUCCESS;
}

static inline int force(struct state **state, const char *function, const char *uuid) {
    char *own_uuid = uuid ? strdup(uuid) : NULL; /* uuid is part of the state, which is freed below */
    int code;
    while ((code = forced(*state, function, own_uuid)) < 0) {
        poll(NULL, 0, HANG_POLL_MS);
        struct state *now = state_load();
        if (!now) continue;
        state_free(*state);
        *state = now;
    }
    free(own_uuid);
    return code;
}

static inline int enter(struct state **state, const char *function) {
    if (!init_count) return UNINITIALIZED;
    if (!(*state = state_load())) return DRIVER_NOT_LOADED;
    return force(state, function, NULL);
}

struct gpu_call {
    struct state *state;
    int gpu, mig; /* mig: -1 for the whole GPU */
    struct section section;
};

static inline int open_gpu(struct gpu_call *call, const char *function, int gpu) {
    if (gpu < 0 || gpu >= call->state->gpu_count) return INVALID_ARGUMENT;
    const char *uuid = value_of(call->state, &call->state->gpus[gpu], "uuid");
    int code = force(&call->state, function, uuid);
    call->gpu = gpu;
    call->section = call->state->gpus[gpu];
    return code ? code : is_lost(call->state, gpu) ? GPU_IS_LOST : SUCCESS;
}

static inline int enter_gpu(struct gpu_call *call, const char *function, device handle) {
    ptrdiff_t offset = handle - &handles[0][0];
    if (offset < 0 || offset >= (ptrdiff_t)sizeof handles) return INVALID_ARGUMENT;
    call->mig = (int)(offset % HANDLES_PER_GPU) - 1;
    int code = enter(&call->state, function);
    return code ? code : open_gpu(call, function, (int)(offset / HANDLES_PER_GPU));
}

static inline void release_state(struct state **state) { state_free(*state); }
static inline void release_call(struct gpu_call *call) { state_free(call->state); }

#define ENTER(state)                                                            \
    struct state *state __attribute__((cleanup(release_state))) = NULL;         \
    { int code_ = enter(&state, __func__); if (code_) return code_; }
#define ENTER_GPU(name, handle)                                                 \
    struct gpu_call name __attribute__((cleanup(release_call))) = {0};          \
    { int code_ = enter_gpu(&name, __func__, handle); if (code_) return code_; }

static inline int copy(const char *value, char *to, unsigned size) {
    if (!value) return NOT_SUPPORTED;
    if (strlen(value) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(to, value);
    return SUCCESS;
}

static inline int number(const struct gpu_call *call, const char *key, unsigned long long *to) {
    const char *value = value_of(call->state, &call->section, key);
    if (value) *to = strtoull(value, NULL, 0);
    return value ? SUCCESS : NOT_SUPPORTED;
}

static inline int small_number(const struct gpu_call *call, const char *key, unsigned *to) {
    unsigned long long value = 0;
    int code = number(call, key, &value);
    if (!code) *to = (unsigned)value;
    return code;
}

/* "mig UUID TOTAL USED GPU_INSTANCE COMPUTE_INSTANCE PROFILE" */
struct mig { char uuid[96], profile[64]; unsigned long long total, used; unsigned gpu_instance, compute_instance; };

static inline int mig_device(const struct gpu_call *call, int index, struct mig *to) {
    const char *value = NULL;
    int after = -1;
    for (int i = 0; i <= index; i++)
        if (!(value = next_value(call->state, &call->section, "mig", &after))) return NOT_FOUND;
    int fields = value ? sscanf(value, "%95s %llu %llu %u %u %63s", to->uuid, &to->total, &to->used, &to->gpu_instance,
                                &to->compute_instance, to->profile) : 0;
    return fields == 6 ? SUCCESS : NOT_FOUND;
}

#endif
