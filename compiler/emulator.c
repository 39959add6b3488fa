/* Runs functions of a cross-built kernels.so under qemu-user on the memory of the process that started it.

   Pages come on demand: a load from an address that is not mapped here asks the parent for the page, a store
   marks it, and what was marked goes back when the function has returned. So the parent's addresses are valid
   here, tables of addresses included, and an access outside of the parent's memory is an error.

   Standard input:  'c' name_length:u32 name threads:u32 count:u32 count x (kind:u32 0 int, 1 float; 8 bytes)
   Standard output: 'p' address:u64 -> the parent answers ok:u8 and PAGE bytes
                    'w' address:u64 PAGE bytes, for each page that was written
                    'r' status:i32, the function's result: the call is over
                    'e' length:u32 text, instead of the result */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 65536ull
#define MOST (1u << 18)
#define THREADS 64

typedef struct {
  int32_t type, zero;
  union {
    int64_t i;
    double d;
  } v;
} Any;
typedef struct {
  void *sync_handle;
  int32_t num_task;
} ParallelEnv;
typedef int (*ParallelLambda)(int, ParallelEnv *, void *);

static uintptr_t pages[MOST];
static uint8_t written[MOST];
static uint32_t slots[MOST];        /* where `index_of` has the page */
static uint32_t index_of[1u << 20]; /* hash table: page -> place in `pages` + 1 */
static unsigned held;
static unsigned team = 1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void read_all(void *data, size_t size) {
  for (char *p = data; size;) {
    ssize_t n = read(0, p, size);
    if (n <= 0) _exit(0); /* the parent is gone */
    p += n, size -= (size_t)n;
  }
}

static void write_all(const void *data, size_t size) {
  for (const char *p = data; size;) {
    ssize_t n = write(1, p, size);
    if (n <= 0) _exit(0);
    p += n, size -= (size_t)n;
  }
}

/* Kernels find this one before the C library's, which clears with DC ZVA: where that faults, qemu 7.2 resumes at
   another instruction, and 16 bytes behind the start of a page keep what they had. */
void *memset(void *data, int value, size_t size) {
  typedef uint64_t __attribute__((may_alias, aligned(1))) Word;
  char *p = data;
  for (; size >= 8; p += 8, size -= 8) *(volatile Word *)p = 0x0101010101010101ull * (uint8_t)value;
  for (; size; p++, size--) *(volatile char *)p = (char)value;
  return data;
}

static void fail(const char *format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  uint32_t length = (uint32_t)vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  write_all("e", 1), write_all(&length, 4), write_all(text, length);
  _exit(1);
}

static uint32_t *slot_of(uintptr_t page) {
  uint32_t at = (uint32_t)((page / PAGE) * 2654435761u) & ((1u << 20) - 1);
  while (index_of[at] && pages[index_of[at] - 1] != page) at = (at + 1) & ((1u << 20) - 1);
  return &index_of[at];
}

static void on_fault(int signal_number, siginfo_t *info, void *context) {
  (void)signal_number, (void)context;
  uintptr_t page = (uintptr_t)info->si_addr & ~(PAGE - 1);
  pthread_mutex_lock(&lock);
  uint32_t *slot = slot_of(page);
  if (*slot) {
    /* Another thread may have brought it meanwhile; then this is one mprotect too much. */
    written[*slot - 1] = 1;
    if (mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE)) fail("mprotect %lx: %s", page, strerror(errno));
  } else {
    if (held == MOST) fail("more than %u pages are used", MOST);
    /* Other threads must fault on the page until its bytes are there: they are read elsewhere. */
    void *place = mmap((void *)page, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (place != (void *)page) fail("occupied: %p", info->si_addr);
    char *fresh = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) fail("no memory: %s", strerror(errno));
    uint64_t address = page;
    uint8_t ok;
    write_all("p", 1), write_all(&address, 8);
    read_all(&ok, 1);
    if (!ok) fail("outside: %p", info->si_addr);
    read_all(fresh, PAGE);
    mprotect(fresh, PAGE, PROT_READ);
    if (mremap(fresh, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) != place)
      fail("mremap: %s", strerror(errno));
    pages[held] = page, written[held] = 0, slots[held] = (uint32_t)(slot - index_of);
    *slot = ++held;
  }
  pthread_mutex_unlock(&lock);
}

typedef struct {
  ParallelLambda lambda;
  void *data;
  int task;
} Task;

static void *run_task(void *argument) {
  Task *task = argument;
  ParallelEnv env = {0, (int32_t)team};
  return (void *)(intptr_t)task->lambda(task->task, &env, task->data);
}

static int launch(ParallelLambda lambda, void *data, int count) {
  (void)count;
  pthread_t ids[THREADS];
  Task tasks[THREADS];
  for (unsigned i = 0; i < team; i++) tasks[i] = (Task){lambda, data, (int)i};
  for (unsigned i = 1; i < team; i++) pthread_create(&ids[i], 0, run_task, &tasks[i]);
  int result = (int)(intptr_t)run_task(&tasks[0]);
  for (unsigned i = 1; i < team; i++) {
    void *other;
    pthread_join(ids[i], &other);
    if (other) result = (int)(intptr_t)other;
  }
  return result;
}

static void *workspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  void *memory = 0;
  (void)device_type, (void)device_id, (void)code, (void)bits;
  return posix_memalign(&memory, 64, bytes ? bytes : 64) ? 0 : memory;
}

static int free_workspace(int device_type, int device_id, void *memory) {
  (void)device_type, (void)device_id;
  free(memory);
  return 0;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  char text[300] = "";
  for (int32_t i = 0; i < count; i++)
    if (parts[i]) strncat(text, parts[i], sizeof text - strlen(text) - 1);
  fail("%s: %s", kind, text);
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { fail("%s: %s", kind, message); }

static void attach(void *library, const char *name, void *function) {
  void **hook = dlsym(library, name);
  if (hook) *hook = function;
}

static void call(void *library) {
  char name[280] = "__tvm_ffi_";
  uint32_t length, count;
  read_all(&length, 4);
  if (length > 200) fail("a name of %u bytes", length);
  read_all(name + strlen(name), length);
  read_all(&team, 4), read_all(&count, 4);
  if (team < 1 || team > THREADS || count > 64) fail("%u threads, %u arguments", team, count);
  Any arguments[64], result;
  memset(&result, 0, sizeof result);
  for (uint32_t i = 0; i < count; i++) {
    uint32_t kind;
    read_all(&kind, 4);
    arguments[i] = (Any){kind ? 3 : 1, 0, {0}};
    read_all(&arguments[i].v, 8);
  }
  int (*function)(void *, Any *, int32_t, Any *) = dlsym(library, name);
  if (!function) fail("no function %s", name + 10);
  int32_t status = function(0, arguments, (int32_t)count, &result);
  for (unsigned i = 0; i < held; i++) {
    uint64_t address = pages[i];
    if (written[i]) write_all("w", 1), write_all(&address, 8), write_all((void *)pages[i], PAGE);
    munmap((void *)pages[i], PAGE);
    index_of[slots[i]] = 0;
  }
  held = 0;
  write_all("r", 1), write_all(&status, 4);
}

int main(int argc, char **argv) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, 0);
  sigaction(SIGBUS, &action, 0);
  void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : 0;
  if (!library) fail("%s", argc > 1 ? dlerror() : "no library was named");
  attach(library, "__TVMBackendParallelLaunch", (void *)launch);
  attach(library, "__TVMBackendAllocWorkspace", (void *)workspace);
  attach(library, "__TVMBackendFreeWorkspace", (void *)free_workspace);
  for (char what;;) {
    read_all(&what, 1);
    if (what == 'c') call(library);
  }
}
