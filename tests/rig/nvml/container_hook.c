/*
 * A double of nvidia-container-runtime-hook: the OCI prestart hook by which dockerd (--gpus, DeviceRequests) hands GPUs
 * to a container. State (pid, bundle) comes as JSON on stdin; the ids asked for stand in bundle/config.json as
 * NVIDIA_VISIBLE_DEVICES. For each it makes /dev/nvidiaN (c 195:N) in the container's mount namespace and, on cgroup
 * v1, allows it in the container's devices cgroup; on v2 runc's rules are an eBPF program that a hook cannot extend, so
 * the node is there but opening it is refused. /dev/nvidiactl (c 195:255) comes with the first, as with the real one.
 * What cannot be granted ends it with 1 and nvidia-container-cli's words on stderr, which the engine hands to its caller.
 */
#define _GNU_SOURCE
#include "gpu_state.h"

#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { NVIDIA_MAJOR = 195, CONTROL_MINOR = 255, PATH_SIZE = 4096 };

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("nvidia-container-cli: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

/* The string after the LAST `opening` up to the next quote: enough JSON for ids and paths, which need no escapes. */
static char *last_string(const char *json, const char *opening) {
    const char *found = NULL;
    for (const char *at = json; (at = strstr(at, opening)); at++) found = at + strlen(opening);
    return found ? strndup(found, strcspn(found, "\"")) : NULL;
}

static char *read_stdin(void) {
    static char text[65536];
    size_t size = fread(text, 1, sizeof text - 1, stdin);
    text[size] = '\0';
    return text;
}

/* The devices.allow of the process's cgroup, opened for writing; NULL where devices are not a v1 cgroup. */
static FILE *open_devices_allow(int pid) {
    char path[PATH_SIZE], line[PATH_SIZE];
    snprintf(path, sizeof path, "/proc/%d/cgroup", pid);
    FILE *cgroups = fopen(path, "re"), *allow = NULL;
    while (cgroups && !allow && fgets(line, sizeof line, cgroups)) {
        char *rest = line;
        strsep(&rest, ":");
        const char *controllers = strsep(&rest, ":");
        if (!rest || !controllers || strcmp(controllers, "devices") != 0) continue;
        rest[strcspn(rest, "\n")] = '\0';
        snprintf(path, sizeof path, "/sys/fs/cgroup/devices%.3900s/devices.allow", rest);
        allow = fopen(path, "we");
    }
    if (cgroups) fclose(cgroups);
    return allow;
}

static void enter_mount_namespace(int pid) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/ns/mnt", pid);
    int namespace = open(path, O_RDONLY | O_CLOEXEC);
    if (namespace < 0 || setns(namespace, CLONE_NEWNS) != 0) fail("container error: cannot enter namespace of %d", pid);
}

static void grant(FILE *devices_allow, const char *rootfs, const char *node, unsigned minor) {
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s/dev/%s", rootfs, node);
    mode_t mask = umask(0);
    if (mknod(path, S_IFCHR | 0666, makedev(NVIDIA_MAJOR, minor)) != 0 && access(path, F_OK) != 0)
        fail("mount error: mknod operation failed: %s: %m", path);
    umask(mask);
    if (devices_allow) {
        fprintf(devices_allow, "c %d:%u rwm", NVIDIA_MAJOR, minor);
        if (fflush(devices_allow) != 0) fail("mount error: failed to add device rules: %m");
    }
}

/* By UUID or by index, as NVIDIA_VISIBLE_DEVICES allows both. */
static int find_gpu(const struct state *state, const char *id) {
    int found = gpu_where(state, "uuid", id);
    char *end = NULL;
    long index = strtol(id, &end, 10);
    if (found < 0 && *id && !*end && index >= 0 && index < state->gpu_count) found = (int)index;
    if (found < 0) fail("device error: %s: unknown device", id);
    if (is_lost(state, found)) fail("detection error: nvml error: gpu is lost: %s", id);
    return found;
}

static void choose(const struct state *state, char *ids, char chosen[STATE_MAX_GPUS]) {
    for (char *rest = ids, *id; (id = strsep(&rest, ","));)
        if (!strcmp(id, "all"))
            for (int i = 0; i < state->gpu_count; i++) chosen[i] = !is_lost(state, i);
        else if (*id && strcmp(id, "none") != 0 && strcmp(id, "void") != 0)
            chosen[find_gpu(state, id)] = 1;
}

int main(int argc, char **argv) {
    if (argc < 2 || strcmp(argv[1], "prestart") != 0) return 0;
    const char *process = read_stdin(), *pid_at = strstr(process, "\"pid\":");
    const char *bundle = last_string(process, "\"bundle\":\"");
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s/config.json", bundle ? bundle : "");
    char *config = read_whole_file(path);
    if (!pid_at || !config) fail("initialization error: no container state on stdin, or no %s", path);
    int pid = atoi(pid_at + strlen("\"pid\":"));
    char *ids = last_string(config, "\"NVIDIA_VISIBLE_DEVICES=");
    char *root = strstr(config, "\"root\":{\"path\":\"");
    char *rootfs = root ? strndup(root + 16, strcspn(root + 16, "\"")) : NULL;
    if (!ids || !rootfs) fail("initialization error: no devices or no root in %s", path);

    struct state *state = state_load();
    if (!state) fail("initialization error: nvml error: driver not loaded");
    char chosen[STATE_MAX_GPUS] = {0};
    choose(state, ids, chosen);
    FILE *devices_allow = open_devices_allow(pid);
    enter_mount_namespace(pid);
    int granted = 0;
    for (int i = 0; i < state->gpu_count; i++) {
        const char *minor = value_of(state, &state->gpus[i], "minor_number");
        char node[32];
        if (!chosen[i]) continue;
        snprintf(node, sizeof node, "nvidia%u", minor ? (unsigned)atoi(minor) : (unsigned)i);
        grant(devices_allow, rootfs, node, minor ? (unsigned)atoi(minor) : (unsigned)i);
        granted++;
    }
    if (granted) grant(devices_allow, rootfs, "nvidiactl", CONTROL_MINOR);
    return 0;
}
