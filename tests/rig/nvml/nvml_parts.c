/* The NVML double: how cards are joined, how MIG divides them, and which processes use them. */
#define _GNU_SOURCE
#include "nvml_call.h"

struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };

/* ---- how cards are joined ---- */

/* Level of the nearest common ancestor: a NUMA node shared or the whole system. */
int nvmlDeviceGetTopologyCommonAncestor(device one, device other, unsigned *level) {
    unsigned node = 0, its_node = 0;
    ENTER_CARD(card, one)
    ENTER_CARD(its_card, other)
    if (small_number(&card, "numa_node", &node) || small_number(&its_card, "numa_node", &its_node))
        return NOT_SUPPORTED;
    *level = card.gpu == its_card.gpu ? 0 : node == its_node ? 40 : 50;
    return SUCCESS;
}

int nvmlDeviceGetP2PStatus(device one, device other, unsigned capability, unsigned *status) {
    unsigned group = 0, its_group = 0;
    ENTER_CARD(card, one)
    ENTER_CARD(its_card, other)
    int joined = !small_number(&card, "nvlink_group", &group) && !small_number(&its_card, "nvlink_group", &its_group) &&
                 group == its_group;
    *status = joined || capability != 2 ? 0 : 5; /* 2: over NVLink; 5: not supported */
    return SUCCESS;
}

int nvmlDeviceGetNvLinkState(device handle, unsigned link, unsigned *active) {
    unsigned links = 0;
    ENTER_CARD(card, handle)
    int code = small_number(&card, "nvlink_count", &links);
    *active = link < links;
    return code;
}

/* ---- MIG ---- */

int nvmlDeviceGetMigMode(device handle, unsigned *current, unsigned *pending) {
    ENTER_CARD(card, handle)
    int code = small_number(&card, "mig_mode_current", current);
    return code ? code : small_number(&card, "mig_mode_pending", pending);
}

int nvmlDeviceGetMaxMigDeviceCount(device handle, unsigned *count) {
    unsigned mode = 0;
    ENTER_CARD(card, handle)
    *count = small_number(&card, "mig_mode_current", &mode) ? 0 : MAX_MIG;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(device handle, unsigned index, device *to) {
    struct mig mig;
    ENTER_CARD(card, handle)
    if (index >= MAX_MIG) return INVALID_ARGUMENT;
    int code = mig_device(&card, (int)index, &mig);
    if (!code) *to = &handles[card.gpu][index + 1];
    return code;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device handle, device *to) {
    ENTER_CARD(card, handle)
    *to = &handles[card.gpu][0];
    return card.mig < 0 ? INVALID_ARGUMENT : SUCCESS;
}

int nvmlDeviceIsMigDeviceHandle(device handle, unsigned *is_mig) {
    ENTER_CARD(card, handle)
    *is_mig = card.mig >= 0;
    return SUCCESS;
}

#define MIG_NUMBER(function, field)                                             \
    int function(device handle, unsigned *to) {                                 \
        struct mig mig;                                                         \
        ENTER_CARD(card, handle)                                                \
        int code = card.mig < 0 ? NOT_SUPPORTED : mig_device(&card, card.mig, &mig); \
        if (!code) *to = mig.field;                                             \
        return code;                                                            \
    }
MIG_NUMBER(nvmlDeviceGetGpuInstanceId, gpu_instance)
MIG_NUMBER(nvmlDeviceGetComputeInstanceId, compute_instance)

/* ---- processes: "process PID USED_BYTES compute|graphics" ---- */

static int processes(const struct card *card, const char *wanted, unsigned *count, struct process *to) {
    unsigned found = 0, room = to ? *count : 0;
    char kind[16];
    int after = -1;
    for (const char *line; (line = next_value(card->state, &card->section, "process", &after));) {
        struct process process = {.gpu_instance = 0xFFFFFFFF, .compute_instance = 0xFFFFFFFF};
        if (sscanf(line, "%u %llu %15s", &process.pid, &process.used, kind) != 3 || strcmp(kind, wanted) != 0) continue;
        if (found < room) to[found] = process;
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#define PROCESSES(function, kind)                                               \
    int function(device handle, unsigned *count, struct process *to) {          \
        ENTER_CARD(card, handle)                                                \
        return processes(&card, kind, count, to);                               \
    }
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, "compute")
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, "compute")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics")
