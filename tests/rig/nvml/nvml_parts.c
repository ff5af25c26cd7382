/* The NVML double: links between GPUs, MIG devices, and processes that use GPUs. */
#define _GNU_SOURCE
#include "nvml_call.h"

struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };

/* ---- links between GPUs ---- */

/* Level of the nearest common ancestor: a NUMA node shared or the whole system. */
int nvmlDeviceGetTopologyCommonAncestor(device one, device other, unsigned *level) {
    unsigned node = 0, its_node = 0;
    ENTER_GPU(call, one)
    ENTER_GPU(its_call, other)
    if (small_number(&call, "numa_node", &node) || small_number(&its_call, "numa_node", &its_node))
        return NOT_SUPPORTED;
    *level = call.gpu == its_call.gpu ? 0 : node == its_node ? 40 : 50;
    return SUCCESS;
}

int nvmlDeviceGetP2PStatus(device one, device other, unsigned capability, unsigned *status) {
    unsigned group = 0, its_group = 0;
    ENTER_GPU(call, one)
    ENTER_GPU(its_call, other)
    int joined = !small_number(&call, "nvlink_group", &group) && !small_number(&its_call, "nvlink_group", &its_group) &&
                 group == its_group;
    *status = joined || capability != 2 ? 0 : 5; /* 2: over NVLink; 5: not supported */
    return SUCCESS;
}

int nvmlDeviceGetNvLinkState(device handle, unsigned link, unsigned *active) {
    unsigned links = 0;
    ENTER_GPU(call, handle)
    int code = small_number(&call, "nvlink_count", &links);
    *active = link < links;
    return code;
}

/* ---- MIG ---- */

int nvmlDeviceGetMigMode(device handle, unsigned *current, unsigned *pending) {
    ENTER_GPU(call, handle)
    int code = small_number(&call, "mig_mode_current", current);
    return code ? code : small_number(&call, "mig_mode_pending", pending);
}

int nvmlDeviceGetMaxMigDeviceCount(device handle, unsigned *count) {
    unsigned mode = 0;
    ENTER_GPU(call, handle)
    *count = small_number(&call, "mig_mode_current", &mode) ? 0 : MAX_MIG;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(device handle, unsigned index, device *to) {
    struct mig mig;
    ENTER_GPU(call, handle)
    if (index >= MAX_MIG) return INVALID_ARGUMENT;
    int code = mig_device(&call, (int)index, &mig);
    if (!code) *to = &handles[call.gpu][index + 1];
    return code;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device handle, device *to) {
    ENTER_GPU(call, handle)
    *to = &handles[call.gpu][0];
    return call.mig < 0 ? INVALID_ARGUMENT : SUCCESS;
}

int nvmlDeviceIsMigDeviceHandle(device handle, unsigned *is_mig) {
    ENTER_GPU(call, handle)
    *is_mig = call.mig >= 0;
    return SUCCESS;
}

#define MIG_NUMBER(function, field)                                             \
    int function(device handle, unsigned *to) {                                 \
        struct mig mig;                                                         \
        ENTER_GPU(call, handle)                                                 \
        int code = call.mig < 0 ? NOT_SUPPORTED : mig_device(&call, call.mig, &mig);\
        if (!code) *to = mig.field;                                             \
        return code;                                                            \
    }
MIG_NUMBER(nvmlDeviceGetGpuInstanceId, gpu_instance)
MIG_NUMBER(nvmlDeviceGetComputeInstanceId, compute_instance)

/* ---- processes: "process PID USED_BYTES compute|graphics" ---- */

static int processes(const struct gpu_call *call, const char *expected, unsigned *count, struct process *to) {
    unsigned found = 0, capacity = to ? *count : 0;
    char kind[16];
    int after = -1;
    for (const char *line; (line = next_value(call->state, &call->section, "process", &after));) {
        struct process process = {.gpu_instance = 0xFFFFFFFF, .compute_instance = 0xFFFFFFFF};
        if (sscanf(line, "%u %llu %15s", &process.pid, &process.used, kind) != 3 || strcmp(kind, expected) != 0) continue;
        if (found < capacity) to[found] = process;
        found++;
    }
    *count = found;
    return found > capacity ? INSUFFICIENT_SIZE : SUCCESS;
}

#define PROCESSES(function, kind)                                               \
    int function(device handle, unsigned *count, struct process *to) {          \
        ENTER_GPU(call, handle)                                                 \
        return processes(&call, kind, count, to);                               \
    }
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, "compute")
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, "compute")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics")
