/*
 * The state file that the NVML double and the container hook read, and FakeGpus (tests/rig/gpus.py) writes.
 *
 * Text, one "key value..." a line. Lines before the first "gpu" concern the whole machine; each line "gpu" opens the
 * section of the next GPU, in index order. A key that is absent is a query that the GPU does not support. The file is
 * replaced by rename, so one read sees one state; it is read again on every call, so a test's change acts at once.
 */
#ifndef GPU_STATE_H
#define GPU_STATE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STATE_MAX_LINES 4096
#define STATE_MAX_GPUS 64

struct line {
    const char *key, *value;
};

struct section {
    int first, end; /* lines[first..end) */
};

struct state {
    char *text;
    int line_count, gpu_count;
    struct line lines[STATE_MAX_LINES];
    struct section machine, gpus[STATE_MAX_GPUS];
};

static inline const char *state_path(void) { return getenv("GPUDOCK_NVML_STATE"); }

static inline char *read_whole_file(const char *path) {
    FILE *file = path ? fopen(path, "re") : NULL;
    if (!file) return NULL;
    size_t size = 0, capacity = 16384;
    char *text = malloc(capacity);
    for (size_t got; text && (got = fread(text + size, 1, capacity - size - 1, file)) > 0;) {
        size += got;
        if (size + 1 >= capacity) text = realloc(text, capacity *= 2);
    }
    fclose(file);
    if (text) text[size] = '\0';
    return text;
}

/* Splits the text in place; at most STATE_MAX_GPUS sections, the rest is ignored. */
static inline void state_parse(struct state *state) {
    struct section *section = &state->machine;
    char *rest = state->text, *text;
    while ((text = strsep(&rest, "\n")) && state->line_count < STATE_MAX_LINES) {
        char *value = text;
        char *key = strsep(&value, " ");
        if (!*key || *key == '#') continue;
        if (!strcmp(key, "gpu")) {
            if (state->gpu_count == STATE_MAX_GPUS) break;
            section = &state->gpus[state->gpu_count++];
            section->first = state->line_count;
        }
        state->lines[state->line_count++] = (struct line){key, value ? value : ""};
        section->end = state->line_count;
    }
}

/* NULL when there is no file, or no memory. */
static inline struct state *state_load(void) {
    char *text = read_whole_file(state_path());
    struct state *state = text ? calloc(1, sizeof *state) : NULL;
    if (!state) {
        free(text);
        return NULL;
    }
    state->text = text;
    state_parse(state);
    return state;
}

static inline void state_free(struct state *state) {
    if (state) free(state->text);
    free(state);
}

/* The value of the section's first line with this key after line `*after` (start at -1); NULL when there is none. */
static inline const char *next_value(const struct state *state, const struct section *section, const char *key,
                                     int *after) {
    for (int i = *after < section->first ? section->first : *after + 1; i < section->end; i++)
        if (!strcmp(state->lines[i].key, key)) {
            *after = i;
            return state->lines[i].value;
        }
    return NULL;
}

static inline const char *value_of(const struct state *state, const struct section *section, const char *key) {
    int after = -1;
    return next_value(state, section, key, &after);
}

static inline int is_lost(const struct state *state, int gpu) {
    const char *lost = value_of(state, &state->gpus[gpu], "lost");
    return lost && strcmp(lost, "0") != 0;
}

/* The index of the GPU whose `key` has this value; -1 when none has. */
static inline int gpu_where(const struct state *state, const char *key, const char *expected) {
    for (int i = 0; i < state->gpu_count; i++) {
        const char *value = value_of(state, &state->gpus[i], key);
        if (value && !strcmp(value, expected)) return i;
    }
    return -1;
}

#endif
