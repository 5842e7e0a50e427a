/* Put before the C library with LD_PRELOAD: calls that change files below a folder are counted, and the k-th one is
 * where the process is killed or the disk fails. `plan` is memory that a process shares with its children: before a
 * child is armed with `at`, nothing changes. See forked.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { NOTHING, KILL, TEAR, FAIL, FAIL_ON, PAUSE };                         /* what happens at the k-th call */
enum { WRITE = 1, FSYNC = 2, RENAME = 4, CREATE = 8, REMOVE = 16, LENGTH = 32, READ = 64 }; /* kinds of calls */
enum { NO_FLOCK = 1, NO_SHM = 2, CLOCK_JUMPS = 4 };                       /* what the machine lacks */

struct plan {
    volatile long count, at, how, kinds, error, without;
    char below[PATH_MAX];
};
struct plan *plan;

__attribute__((constructor)) static void begin(void) {
    plan = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int below(const char *path) { return !strncmp(path, plan->below, strlen(plan->below)); }

static int is_path(int folder, const char *name) {
    char path[PATH_MAX], link[64];
    ssize_t n;
    if (name[0] == '/') return below(name);
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    if ((n = readlink(link, path, PATH_MAX / 2)) < 0) return 0;
    snprintf(path + n, PATH_MAX - n, "/%s", name);
    return below(path);
}

static int is_file(int file) {
    char path[PATH_MAX], link[64];
    ssize_t n;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if ((n = readlink(link, path, PATH_MAX - 1)) < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Whether this call fails. `kind` is one of those that count, of a file below the folder. */
static int fails(long kind) {
    if (!(plan->kinds & kind)) return 0;
    long number = __sync_add_and_fetch(&plan->count, 1);
    if (plan->how == NOTHING || number < plan->at || (number > plan->at && plan->how != FAIL_ON)) return 0;
    if (plan->how == KILL || plan->how == TEAR) kill(getpid(), SIGKILL);
    if (plan->how == PAUSE) {
        while (plan->how == PAUSE) usleep(5000);
        return 0;
    }
    errno = plan->error;
    return 1;
}

/* A full disk has room for what was taken before. */
static int has_room(int file, off64_t end) {
    struct stat64 about;
    int is_full = plan->how >= FAIL && (plan->error == ENOSPC || plan->error == EDQUOT);
    return is_full && !fstat64(file, &about) && end <= about.st_size;
}

#define WATCHED (plan && plan->below[0])
#define WRITES(name, signature, call, part)                                                     \
    ssize_t name signature {                                                                    \
        NEXT(name);                                                                             \
        if (WATCHED && is_file(file)) {                                                         \
            if (plan->how == TEAR && (plan->kinds & WRITE) && plan->count + 1 == plan->at) part; \
            if (fails(WRITE)) return -1;                                                        \
        }                                                                                       \
        return next call;                                                                       \
    }
WRITES(write, (int file, const void *data, size_t n), (file, data, n), next(file, data, n / 2))
#define INTO(name, type)                                                                      \
    ssize_t name(int file, const void *data, size_t n, type at) {                             \
        NEXT(name);                                                                           \
        if (WATCHED && is_file(file) && !has_room(file, at + (type)n)) {                      \
            if (plan->how == TEAR && (plan->kinds & WRITE) && plan->count + 1 == plan->at)    \
                next(file, data, n / 2, at);                                                  \
            if (fails(WRITE)) return -1;                                                      \
        }                                                                                     \
        return next(file, data, n, at);                                                       \
    }
INTO(pwrite, off_t)
INTO(pwrite64, off64_t)
WRITES(sendfile, (int file, int from, off_t *at, size_t n), (file, from, at, n), next(file, from, at, n / 2))
WRITES(sendfile64, (int file, int from, off64_t *at, size_t n), (file, from, at, n), next(file, from, at, n / 2))

#define ON(name, signature, call, kind, asked)         \
    int name signature {                               \
        NEXT(name);                                    \
        if (WATCHED && (asked) && fails(kind)) return -1; \
        return next call;                              \
    }
ON(ftruncate, (int file, off_t n), (file, n), LENGTH, is_file(file))
ON(ftruncate64, (int file, off64_t n), (file, n), LENGTH, is_file(file))
ON(truncate, (const char *path, off_t n), (path, n), LENGTH, is_path(AT_FDCWD, path))
ON(truncate64, (const char *path, off64_t n), (path, n), LENGTH, is_path(AT_FDCWD, path))
ON(rename, (const char *a, const char *b), (a, b), RENAME, is_path(AT_FDCWD, b))
ON(renameat, (int f, const char *a, int g, const char *b), (f, a, g, b), RENAME, is_path(g, b))
ON(link, (const char *a, const char *b), (a, b), RENAME, is_path(AT_FDCWD, b))
ON(linkat, (int f, const char *a, int g, const char *b, int flags), (f, a, g, b, flags), RENAME, is_path(g, b))
ON(mkdir, (const char *path, mode_t mode), (path, mode), CREATE, is_path(AT_FDCWD, path))
ON(mkdirat, (int f, const char *path, mode_t mode), (f, path, mode), CREATE, is_path(f, path))
ON(unlink, (const char *path), (path), REMOVE, is_path(AT_FDCWD, path))
ON(unlinkat, (int f, const char *path, int flags), (f, path, flags), REMOVE, is_path(f, path))
ON(rmdir, (const char *path), (path), REMOVE, is_path(AT_FDCWD, path))

/* No power fails here, so that nothing has to wait for the disk. */
#define SYNC(name) \
    int name(int file) { return WATCHED && is_file(file) && fails(FSYNC) ? -1 : 0; }
SYNC(fsync)
SYNC(fdatasync)

#define OPENS(name, signature, call, folder)                                          \
    int name signature {                                                                      \
        NEXT(name);                                                                           \
        mode_t mode = 0;                                                                      \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                  \
            va_list rest;                                                                     \
            va_start(rest, flags);                                                            \
            mode = va_arg(rest, mode_t);                                                      \
            va_end(rest);                                                                     \
        }                                                                                     \
        if (WATCHED && is_path(folder, path) && fails(flags & (O_CREAT | O_TRUNC) ? CREATE : READ)) \
            return -1;                                                                     \
        return next call;                                                                     \
    }
OPENS(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPENS(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPENS(openat, (int f, const char *path, int flags, ...), (f, path, flags, mode), f)
OPENS(openat64, (int f, const char *path, int flags, ...), (f, path, flags, mode), f)

int flock(int file, int operation) {
    NEXT(flock);
    if (plan && plan->without & NO_FLOCK) {
        errno = ENOLCK;
        return -1;
    }
    return next(file, operation);
}

int shm_open(const char *name, int flags, mode_t mode) {
    NEXT(shm_open);
    if (plan && plan->without & NO_SHM) {
        errno = ENOENT;
        return -1;
    }
    return next(name, flags, mode);
}

/* A day forward and back again by turns, as when a clock is set while a program runs. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    NEXT(clock_gettime);
    static long calls;
    int failed = next(clock, now);
    if (!failed && clock == CLOCK_REALTIME && plan && plan->without & CLOCK_JUMPS)
        now->tv_sec += __sync_add_and_fetch(&calls, 1) % 2 ? 86400 : -86400;
    return failed;
}
