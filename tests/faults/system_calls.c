// System calls on the files of one folder that fail, or end the process, when their turn comes.
//
// LD_PRELOAD puts these functions in front of the C library's. injection.py arms them.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { KILL = -1, SHORT = -2 };  // besides errno's numbers

static char watched[PATH_MAX];
static size_t watched_length;
static int calls, failing_call, failing_kind;

// Counts the calls on files below `folder` from now on. The call of that number fails: `kind` is an errno, KILL or SHORT.
void arm(const char* folder, int call, int kind) {
  watched_length = strlen(folder);
  memcpy(watched, folder, watched_length + 1);
  calls = 0;
  failing_call = call;
  failing_kind = kind;
}

int count_calls(void) { return calls; }

static int is_below(const char* path) { return watched_length && strncmp(path, watched, watched_length) == 0; }

static int is_open_below(int descriptor) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_below(path);
}

static int concerns(int folder, const char* path) {
  return path[0] == '/' || folder == AT_FDCWD ? is_below(path) : is_open_below(folder);
}

// Returns whether this call fails. Interruptions and short writes happen to calls that can have them.
// Opening a file to read it is not interrupted on local disks, and torch does not try it again.
static int is_next(int concerned, int can_be_interrupted, int is_write) {
  if (!concerned || ++calls != failing_call) return 0;
  if (failing_kind == KILL) kill(getpid(), SIGKILL);
  if (failing_kind == SHORT) return is_write;
  if (failing_kind == EINTR && !can_be_interrupted) return 0;
  errno = failing_kind;
  return 1;
}

#define HAS_MODE(flags) ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE)
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                           \
  int name(const char* path, int flags, ...) {                                               \
    va_list rest;                                                                            \
    va_start(rest, flags);                                                                   \
    const mode_t mode = HAS_MODE(flags) ? va_arg(rest, mode_t) : 0;                          \
    va_end(rest);                                                                            \
    return is_next(is_below(path), flags & O_CREAT, 0) ? -1 : NEXT(name)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPEN_AT(name)                                                                                        \
  int name(int folder, const char* path, int flags, ...) {                                                   \
    va_list rest;                                                                                            \
    va_start(rest, flags);                                                                                   \
    const mode_t mode = HAS_MODE(flags) ? va_arg(rest, mode_t) : 0;                                          \
    va_end(rest);                                                                                            \
    return is_next(concerns(folder, path), flags & O_CREAT, 0) ? -1 : NEXT(name)(folder, path, flags, mode); \
  }
OPEN_AT(openat)
OPEN_AT(openat64)

ssize_t write(int descriptor, const void* bytes, size_t count) {
  if (!is_next(is_open_below(descriptor), 1, 1)) return NEXT(write)(descriptor, bytes, count);
  return failing_kind == SHORT ? NEXT(write)(descriptor, bytes, count > 1 ? count / 2 : count) : -1;
}

#define ON_DESCRIPTOR(name, parameters, arguments) \
  int name parameters { return is_next(is_open_below(descriptor), 1, 0) ? -1 : NEXT(name) arguments; }
// The machine stays on, so no data has to reach the disk, which would take most of the time.
int fsync(int descriptor) { return is_next(is_open_below(descriptor), 1, 0) ? -1 : 0; }
ON_DESCRIPTOR(ftruncate, (int descriptor, off_t length), (descriptor, length))
ON_DESCRIPTOR(ftruncate64, (int descriptor, off64_t length), (descriptor, length))

#define ON_PATH(name, parameters, arguments, path) \
  int name parameters { return is_next(is_below(path), 0, 0) ? -1 : NEXT(name) arguments; }
ON_PATH(rename, (const char* from, const char* to), (from, to), to)
ON_PATH(mkdir, (const char* path, mode_t mode), (path, mode), path)
ON_PATH(unlink, (const char* path), (path), path)
ON_PATH(rmdir, (const char* path), (path), path)
ON_PATH(symlink, (const char* target, const char* path), (target, path), path)
ON_PATH(chmod, (const char* path, mode_t mode), (path, mode), path)

int unlinkat(int folder, const char* path, int flags) {
  return is_next(concerns(folder, path), 0, 0) ? -1 : NEXT(unlinkat)(folder, path, flags);
}
