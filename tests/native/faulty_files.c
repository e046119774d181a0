/* Preloaded into a process, makes one of its file operations fail, or kills the process before or after it.
 *
 * Every call of the C library that changes a file or a folder is counted from arm() on; the one with the given number gets
 * the fault. Python writes files through these alone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { NONE, KILL_BEFORE, KILL_AFTER, ERROR, SHORT, SHORT_THEN_FULL };

static int armed, fault, at, code, calls;
static char names[4096];

void arm(int kind, int number, int error) {
    fault = kind, at = number, code = error, calls = 0, names[0] = 0, armed = 1;
}

/* Returns how many calls there were. */
int disarm(void) {
    armed = 0;
    return calls;
}

/* Their names, each with a space behind it. */
const char* called(void) { return names; }

/* 1: this call gets the fault. */
static int now(const char* name) {
    if (!armed) return 0;
    if (strlen(names) + strlen(name) + 2 < sizeof names) strcat(strcat(names, name), " ");
    if (++calls != at) return 0;
    if (fault == KILL_BEFORE) kill(getpid(), SIGKILL);
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define FAULTY(name, arguments)                \
    const int hit = now(#name);                \
    if (hit && fault == ERROR) {               \
        errno = code;                          \
        return -1;                             \
    }                                          \
    const __typeof__(name arguments) result = REAL(name) arguments; \
    if (hit && fault == KILL_AFTER) kill(getpid(), SIGKILL);        \
    return result;

ssize_t write(int file, const void* data, size_t size) {
    const int hit = now("write");
    if (hit && fault == ERROR) {
        errno = code;
        return -1;
    }
    if (armed && fault == SHORT_THEN_FULL && calls == at + 1) {
        errno = ENOSPC;
        return -1;
    }
    if (hit && fault >= SHORT) size = (size + 1) / 2;
    const ssize_t result = REAL(write)(file, data, size);
    if (hit && fault == KILL_AFTER) kill(getpid(), SIGKILL);
    return result;
}

int fsync(int file) { FAULTY(fsync, (file)) }
int rename(const char* from, const char* to) { FAULTY(rename, (from, to)) }
int renameat(int a, const char* from, int b, const char* to) { FAULTY(renameat, (a, from, b, to)) }
int mkdir(const char* path, mode_t mode) { FAULTY(mkdir, (path, mode)) }
int mkdirat(int folder, const char* path, mode_t mode) { FAULTY(mkdirat, (folder, path, mode)) }
int unlink(const char* path) { FAULTY(unlink, (path)) }
int unlinkat(int folder, const char* path, int flags) { FAULTY(unlinkat, (folder, path, flags)) }
int rmdir(const char* path) { FAULTY(rmdir, (path)) }
int ftruncate64(int file, off64_t size) { FAULTY(ftruncate64, (file, size)) }

static mode_t mode_of(int flags, va_list rest) { return flags & O_CREAT ? va_arg(rest, mode_t) : 0; }

#define OPEN(name, real_arguments, last)       \
    va_list rest;                              \
    va_start(rest, last);                      \
    const mode_t mode = mode_of(flags, rest);  \
    va_end(rest);                              \
    if (!(flags & (O_CREAT | O_WRONLY | O_RDWR))) return REAL(name) real_arguments; \
    const int hit = now(#name);                \
    if (hit && fault == ERROR) {               \
        errno = code;                          \
        return -1;                             \
    }                                          \
    const int result = REAL(name) real_arguments;            \
    if (hit && fault == KILL_AFTER) kill(getpid(), SIGKILL); \
    return result;

int open(const char* path, int flags, ...) { OPEN(open, (path, flags, mode), flags) }
int open64(const char* path, int flags, ...) { OPEN(open64, (path, flags, mode), flags) }
int openat(int folder, const char* path, int flags, ...) { OPEN(openat, (folder, path, flags, mode), flags) }
int openat64(int folder, const char* path, int flags, ...) { OPEN(openat64, (folder, path, flags, mode), flags) }
