/*
 * A double of NVIDIA's management library (libnvidia-ml.so.1): the functions that a GPU inventory calls through pynvml,
 * with NVML's names, structures and return codes (nvml.h, as nvidia-ml-py mirrors it), answered from the state file
 * that gpu_state.h describes. Here: the library, the machine, a GPU's identity and condition; nvml_parts.c has MIG,
 * links and processes, nvml_events.c the events.
 */
#define _GNU_SOURCE
#include "nvml_call.h"

#define TEMPERATURE_V1 0x100000C

char handles[STATE_MAX_GPUS][HANDLES_PER_GPU];
atomic_int init_count;

struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };
struct utilization { unsigned gpu, memory; };
struct temperature { unsigned version, sensor; int celsius; };
struct pci { char legacy_id[16]; unsigned domain, bus, device, device_id, subsystem_id; char id[32]; };

/* ---- the library and the machine ---- */

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    struct state *state __attribute__((cleanup(release_state))) = state_load();
    if (!state) return DRIVER_NOT_LOADED;
    int code = force(&state, "nvmlInitWithFlags", NULL);
    if (!code) code = force(&state, "nvmlInit_v2", NULL);
    if (!code) init_count++;
    return code;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    ENTER(state)
    init_count--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case GPU_IS_LOST: return "GPU is lost";
    case 16: return "GPU requires reset";
    case 18: return "Driver/library version mismatch";
    case MEMORY: return "Insufficient Memory";
    case VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
    }
}

#define MACHINE_TEXT(function, key)                                             \
    int function(char *to, unsigned size) {                                     \
        ENTER(state)                                                            \
        return copy(value_of(state, &state->machine, key), to, size);           \
    }
MACHINE_TEXT(nvmlSystemGetDriverVersion, "driver_version")
MACHINE_TEXT(nvmlSystemGetNVMLVersion, "nvml_version")

#define CUDA_VERSION(function)                                                  \
    int function(int *to) {                                                     \
        ENTER(state)                                                            \
        const char *value = value_of(state, &state->machine, "cuda_driver_version");\
        if (value) *to = atoi(value);                                           \
        return value ? SUCCESS : NOT_SUPPORTED;                                 \
    }
CUDA_VERSION(nvmlSystemGetCudaDriverVersion)
CUDA_VERSION(nvmlSystemGetCudaDriverVersion_v2)

int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned size) {
    char path[64];
    ENTER(state)
    snprintf(path, sizeof path, "/proc/%u/comm", pid);
    char *text = read_whole_file(path);
    if (!text) return NOT_FOUND;
    text[strcspn(text, "\n")] = '\0';
    int code = copy(text, name, size);
    free(text);
    return code;
}

/* ---- handles ---- */

int nvmlDeviceGetCount_v2(unsigned *count) {
    ENTER(state)
    *count = (unsigned)state->gpu_count;
    return SUCCESS;
}

static int hand_out(const char *function, int gpu, struct state **state, device *to) {
    struct gpu_call call = {.state = *state};
    int code = open_gpu(&call, function, gpu);
    *state = call.state;
    if (!code) *to = &handles[gpu][0];
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *to) {
    ENTER(state)
    return hand_out(__func__, index < STATE_MAX_GPUS ? (int)index : -1, &state, to);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device *to) {
    ENTER(state)
    int gpu = gpu_where(state, "uuid", uuid);
    return gpu < 0 ? NOT_FOUND : hand_out(__func__, gpu, &state, to);
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *id, device *to) {
    ENTER(state)
    int gpu = gpu_where(state, "pci_bus_id", id);
    return gpu < 0 ? NOT_FOUND : hand_out(__func__, gpu, &state, to);
}

/* ---- identity of a GPU ---- */

int nvmlDeviceGetUUID(device handle, char *to, unsigned size) {
    struct mig mig;
    ENTER_GPU(call, handle)
    if (call.mig < 0) return copy(value_of(call.state, &call.section, "uuid"), to, size);
    int code = mig_device(&call, call.mig, &mig);
    return code ? code : copy(mig.uuid, to, size);
}

int nvmlDeviceGetName(device handle, char *to, unsigned size) {
    struct mig mig;
    char text[192];
    ENTER_GPU(call, handle)
    const char *name = value_of(call.state, &call.section, "name");
    if (call.mig < 0 || !name) return copy(name, to, size);
    int code = mig_device(&call, call.mig, &mig);
    snprintf(text, sizeof text, "%.100s MIG %s", name, mig.profile);
    return code ? code : copy(text, to, size);
}

int nvmlDeviceGetIndex(device handle, unsigned *to) {
    ENTER_GPU(call, handle)
    *to = (unsigned)call.gpu;
    return SUCCESS;
}

int nvmlDeviceGetSerial(device handle, char *to, unsigned size) {
    ENTER_GPU(call, handle)
    return copy(value_of(call.state, &call.section, "serial"), to, size);
}

int nvmlDeviceGetPciInfo_v3(device handle, struct pci *to) {
    unsigned long long device_id = 0, subsystem_id = 0;
    ENTER_GPU(call, handle)
    const char *id = value_of(call.state, &call.section, "pci_bus_id");
    *to = (struct pci){0};
    if (!id || sscanf(id, "%x:%x:%x", &to->domain, &to->bus, &to->device) != 3) return NOT_SUPPORTED;
    if (!number(&call, "pci_device_id", &device_id)) to->device_id = (unsigned)device_id;
    if (!number(&call, "pci_subsystem_id", &subsystem_id)) to->subsystem_id = (unsigned)subsystem_id;
    snprintf(to->legacy_id, sizeof to->legacy_id, "%04x:%02X:%02X.0", to->domain & 0xFFFF, to->bus & 0xFF,
             to->device & 0xFF);
    return copy(id, to->id, sizeof to->id);
}

int nvmlDeviceGetCudaComputeCapability(device handle, int *major, int *minor) {
    ENTER_GPU(call, handle)
    const char *value = value_of(call.state, &call.section, "compute_capability");
    return value && sscanf(value, "%d.%d", major, minor) == 2 ? SUCCESS : NOT_SUPPORTED;
}

/* ---- condition of a GPU ---- */

#define GPU_NUMBER(function, key)                                               \
    int function(device handle, unsigned *to) {                                 \
        ENTER_GPU(call, handle)                                                 \
        return small_number(&call, key, to);                                    \
    }
GPU_NUMBER(nvmlDeviceGetMinorNumber, "minor_number")
GPU_NUMBER(nvmlDeviceGetNumaNodeId, "numa_node")
GPU_NUMBER(nvmlDeviceGetPowerUsage, "power_milliwatts")
GPU_NUMBER(nvmlDeviceGetPowerManagementLimit, "power_limit_milliwatts")
GPU_NUMBER(nvmlDeviceGetEnforcedPowerLimit, "power_limit_milliwatts")
GPU_NUMBER(nvmlDeviceGetPersistenceMode, "persistence_mode")
GPU_NUMBER(nvmlDeviceGetComputeMode, "compute_mode")
GPU_NUMBER(nvmlDeviceGetRetiredPagesPendingStatus, "retired_pages_pending")

static int memory_of(const struct gpu_call *call, unsigned long long *total, unsigned long long *used) {
    struct mig mig;
    if (call->mig < 0)
        return number(call, "memory_total_bytes", total) || number(call, "memory_used_bytes", used) ? NOT_SUPPORTED : 0;
    int code = mig_device(call, call->mig, &mig);
    if (!code) *total = mig.total, *used = mig.used;
    return code;
}

int nvmlDeviceGetMemoryInfo(device handle, struct memory *to) {
    ENTER_GPU(call, handle)
    int code = memory_of(&call, &to->total, &to->used);
    to->free = to->total - to->used;
    return code;
}

int nvmlDeviceGetMemoryInfo_v2(device handle, struct memory_v2 *to) {
    ENTER_GPU(call, handle)
    int code = memory_of(&call, &to->total, &to->used);
    if (number(&call, "memory_reserved_bytes", &to->reserved)) to->reserved = 0;
    to->free = to->total - to->used - to->reserved;
    return code;
}

int nvmlDeviceGetUtilizationRates(device handle, struct utilization *to) {
    ENTER_GPU(call, handle)
    if (call.mig >= 0) return NOT_SUPPORTED;
    int code = small_number(&call, "utilization_gpu_percent", &to->gpu);
    return code ? code : small_number(&call, "utilization_memory_percent", &to->memory);
}

int nvmlDeviceGetTemperature(device handle, unsigned sensor, unsigned *to) {
    ENTER_GPU(call, handle)
    return sensor ? INVALID_ARGUMENT : small_number(&call, "temperature_celsius", to);
}

int nvmlDeviceGetTemperatureV(device handle, struct temperature *to) {
    ENTER_GPU(call, handle)
    if (to->version != TEMPERATURE_V1) return VERSION_MISMATCH;
    return to->sensor ? INVALID_ARGUMENT : small_number(&call, "temperature_celsius", (unsigned *)&to->celsius);
}

int nvmlDeviceGetTotalEccErrors(device handle, unsigned kind, unsigned counter, unsigned long long *to) {
    (void)counter;
    ENTER_GPU(call, handle)
    return number(&call, kind ? "ecc_uncorrected" : "ecc_corrected", to);
}

/* "retired_page CAUSE ADDRESS TIMESTAMP"; absent lines are no retired pages, not an unsupported query. */
int nvmlDeviceGetRetiredPages_v2(device handle, unsigned cause, unsigned *count, unsigned long long *addresses,
                                 unsigned long long *times) {
    unsigned found = 0, capacity = *count, its_cause;
    unsigned long long address, when;
    int after = -1;
    ENTER_GPU(call, handle)
    for (const char *page; (page = next_value(call.state, &call.section, "retired_page", &after));) {
        if (sscanf(page, "%u %lli %llu", &its_cause, (long long *)&address, &when) != 3 || its_cause != cause) continue;
        if (addresses && found < capacity) addresses[found] = address;
        if (times && found < capacity) times[found] = when;
        found++;
    }
    *count = found;
    return found > capacity || (found && !addresses) ? INSUFFICIENT_SIZE : SUCCESS;
}
int nvmlDeviceGetRetiredPages(device handle, unsigned cause, unsigned *count, unsigned long long *addresses) {
    return nvmlDeviceGetRetiredPages_v2(handle, cause, count, addresses, NULL);
}

int nvmlDeviceGetRemappedRows(device handle, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                              unsigned *failed) {
    ENTER_GPU(call, handle)
    const char *value = value_of(call.state, &call.section, "remapped_rows");
    return value && sscanf(value, "%u %u %u %u", corrected, uncorrected, pending, failed) == 4 ? SUCCESS
                                                                                               : NOT_SUPPORTED;
}
