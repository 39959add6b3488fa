/* TVM's parallel launch on the OpenMP threads that torch has already started: one pool for both. */
#include <stdint.h>
#include <stdlib.h>

typedef struct {
  void *sync_handle;
  int32_t num_task;
} ParallelEnv;
typedef int (*ParallelLambda)(int task_id, ParallelEnv *env, void *data);
typedef struct {
  ParallelLambda lambda;
  void *data;
  int result;
} Launch;

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_num)(void);
static int (*num_threads)(void);
static int (*max_threads)(void);
static int (*in_parallel)(void);

void ef_initialise(void *parallel, void *num, void *count, void *max, void *inside) {
  gomp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
  thread_num = (int (*)(void))num;
  num_threads = (int (*)(void))count;
  max_threads = (int (*)(void))max;
  in_parallel = (int (*)(void))inside;
}

static void run_one(void *argument) {
  Launch *launch = (Launch *)argument;
  ParallelEnv env = {0, num_threads()};
  int result = launch->lambda(thread_num(), &env, launch->data);
  if (result) launch->result = result;
}

int ef_parallel_launch(ParallelLambda lambda, void *data, int num_task) {
  int count = num_task == 0 ? max_threads() : num_task;
  if (count == 1 || in_parallel()) {
    ParallelEnv env = {0, 1};
    return lambda(0, &env, data);
  }
  Launch launch = {lambda, data, 0};
  gomp_parallel(run_one, &launch, (unsigned)count, 0);
  return launch.result;
}

static void count_team(void *argument) {
  if (thread_num() == 0) *(int *)argument = num_threads();
}

/* The threads that a launch really gets: a limit of the environment may give fewer than asked for. */
int ef_team_size(void) {
  int count = 1;
  if (max_threads() > 1 && !in_parallel()) gomp_parallel(count_team, &count, (unsigned)max_threads(), 0);
  return count;
}

void *ef_workspace_alloc(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  void *memory = 0;
  (void)device_type, (void)device_id, (void)code, (void)bits;
  return posix_memalign(&memory, 64, bytes ? bytes : 64) ? 0 : memory;
}

int ef_workspace_free(int device_type, int device_id, void *memory) {
  (void)device_type, (void)device_id;
  free(memory);
  return 0;
}
