/* The NVML double: event sets, fed by the state's lines "event SEQUENCE UUID TYPE DATA", sequence rising. */
#define _GNU_SOURCE
#include "nvml_call.h"

#include <libgen.h>
#include <sys/inotify.h>
#include <time.h>
#include <unistd.h>

#define EVENT_TYPES 0xFULL /* single and double bit ECC, P-state, critical XID */

struct event { device device; unsigned long long type, data; unsigned gpu_instance, compute_instance; };
struct event_set { unsigned long long seen, types[STATE_MAX_GPUS]; };

struct reported { unsigned long long sequence, type, data; char uuid[96]; };

static int read_event(const struct state *state, int *after, struct reported *to) {
    const char *line;
    while ((line = next_value(state, &state->machine, "event", after)))
        if (sscanf(line, "%llu %95s %llu %llu", &to->sequence, to->uuid, &to->type, &to->data) == 4) return 1;
    return 0;
}

int nvmlDeviceGetSupportedEventTypes(device handle, unsigned long long *types) {
    ENTER_GPU(call, handle)
    *types = EVENT_TYPES;
    return SUCCESS;
}

/* Only what happens after a set was made is delivered to it. */
int nvmlEventSetCreate(struct event_set **to) {
    struct reported event;
    int after = -1;
    ENTER(state)
    if (!(*to = calloc(1, sizeof **to))) return MEMORY;
    while (read_event(state, &after, &event)) (*to)->seen = event.sequence;
    return SUCCESS;
}

int nvmlDeviceRegisterEvents(device handle, unsigned long long types, struct event_set *set) {
    ENTER_GPU(call, handle)
    if (types & ~EVENT_TYPES) return NOT_SUPPORTED;
    set->types[call.gpu] |= types;
    return SUCCESS;
}

int nvmlEventSetFree(struct event_set *set) {
    ENTER(state)
    free(set);
    return SUCCESS;
}

/* The next event of a registered GPU; if there is none, GPU_IS_LOST if one of them is lost, as NVML documents. */
static int next_event(struct event_set *set, const struct state *state, struct event *to) {
    struct reported event;
    int after = -1;
    while (read_event(state, &after, &event)) {
        int gpu = event.sequence > set->seen ? gpu_where(state, "uuid", event.uuid) : -1;
        if (gpu < 0) continue;
        set->seen = event.sequence;
        if (!(set->types[gpu] & event.type)) continue;
        *to = (struct event){&handles[gpu][0], event.type, event.data, 0xFFFFFFFF, 0xFFFFFFFF};
        return SUCCESS;
    }
    for (int gpu = 0; gpu < state->gpu_count; gpu++)
        if (set->types[gpu] && is_lost(state, gpu)) return GPU_IS_LOST;
    return TIMEOUT;
}

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Watches the state file's folder, because the file is replaced and never written in place. */
static int watch_state(void) {
    char path[4096];
    int watch = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    snprintf(path, sizeof path, "%s", state_path());
    inotify_add_watch(watch, dirname(path), IN_MOVED_TO | IN_CLOSE_WRITE | IN_DELETE);
    return watch;
}

int nvmlEventSetWait_v2(struct event_set *set, struct event *to, unsigned timeout_ms) {
    char changes[4096];
    int code;
    long long deadline = now_ms() + timeout_ms, left = timeout_ms;
    struct pollfd watch = {.fd = watch_state(), .events = POLLIN};
    for (;; left = deadline - now_ms()) {
        struct state *state = NULL;
        if ((code = enter(&state, __func__)) == SUCCESS) code = next_event(set, state, to);
        state_free(state);
        if (code != TIMEOUT || left <= 0) break;
        poll(&watch, 1, (int)left);
        while (read(watch.fd, changes, sizeof changes) > 0) {}
    }
    close(watch.fd);
    return code;
}
int nvmlEventSetWait(struct event_set *set, struct event *to, unsigned timeout_ms) {
    return nvmlEventSetWait_v2(set, to, timeout_ms);
}
