// Runs compiled functions without TVM's runtime: what they ask of it stands here, in a few lines of C.
//
//   harness NAME OPERANDS RESULTS
//
// OPERANDS holds arrays: their number, then for each its type code, bits and number of dimensions (int32), the
// dimensions (int64) and the values. RESULTS gets the values of all of them after the call. Every array ends at a page
// that cannot be touched, and starts behind one. FUNCTIONS lists the functions that are linked in: F(name) F(name) ...

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#define MOST_ARRAYS 8
#define MOST_DIMENSIONS 8
#define ALIGNMENT 64
#define FILL 0xA5
#define TASKS 3  // more than one, so that tasks split the work, and no divisor of most loops

static void fail(const char *what, const char *which) {
  fprintf(stderr, "harness: %s%s%s\n", what, *which ? ": " : "", which);
  exit(2);
}

// What compiled code calls or reaches through pointers that TVM's loader would set.

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++) fprintf(stderr, "%s", parts[i] ? parts[i] : "");
  fprintf(stderr, "\n");
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { fprintf(stderr, "%s: %s\n", kind, message); }

typedef struct {
  void *sync_handle;
  int32_t num_task;
} Group;

typedef int (*Work)(int task, Group *group, void *data);

typedef struct {
  Work work;
  void *data;
  Group *group;
  int task, status;
} Task;

static void *run_task(void *argument) {
  Task *task = argument;
  task->status = task->work(task->task, task->group, task->data);
  return NULL;
}

// One task after the other, each in a thread of its own: what a thread has to prepare for itself is not inherited.
static int parallel_launch(Work work, void *data, int count) {
  Group group = {NULL, count ? count : TASKS};
  for (int i = 0; i < group.num_task; i++) {
    Task task = {work, data, &group, i, 0};
    pthread_t thread;
    if (pthread_create(&thread, NULL, run_task, &task) || pthread_join(thread, NULL)) fail("cannot start a thread", "");
    if (task.status) return task.status;
  }
  return 0;
}

static void *alloc_workspace(int device, int id, uint64_t bytes, int code, int bits) {
  return aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

static int free_workspace(int device, int id, void *memory) {
  free(memory);
  return 0;
}

void *__TVMBackendParallelLaunch = (void *)parallel_launch;
void *__TVMBackendAllocWorkspace = (void *)alloc_workspace;
void *__TVMBackendFreeWorkspace = (void *)free_workspace;

#define F(name) int __tvm_ffi_##name(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);
FUNCTIONS
#undef F

static const struct {
  const char *name;
  TVMFFISafeCallType call;
} functions[] = {
#define F(name) {#name, __tvm_ffi_##name},
    FUNCTIONS
#undef F
};

typedef struct {
  DLTensor tensor;
  int64_t shape[MOST_DIMENSIONS], strides[MOST_DIMENSIONS];
  size_t bytes, slack;
} Array;

static void *allocate(size_t bytes, size_t *slack) {
  size_t page = sysconf(_SC_PAGESIZE), used = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  size_t pages = (used + page - 1) / page * page;
  char *all = mmap(NULL, pages + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || (pages && mprotect(all + page, pages, PROT_READ | PROT_WRITE))) fail("out of memory", "");
  memset(all + page, FILL, pages);
  *slack = used - bytes;
  return all + page + pages - used;
}

static void get(void *to, size_t bytes, FILE *file) {
  if (bytes && fread(to, bytes, 1, file) != 1) fail("the operands end early", "");
}

static void read_array(Array *array, FILE *file) {
  int32_t head[3];
  get(head, sizeof head, file);
  DLTensor *tensor = &array->tensor;
  *tensor = (DLTensor){.device = {kDLCPU, 0}, .ndim = head[2], .dtype = {head[0], head[1], 1}};
  if (head[2] > MOST_DIMENSIONS) fail("too many dimensions", "");
  get(array->shape, head[2] * sizeof(int64_t), file);
  int64_t count = 1;
  for (int i = head[2] - 1; i >= 0; i--) {
    array->strides[i] = count;
    count *= array->shape[i];
  }
  tensor->shape = array->shape;
  tensor->strides = array->strides;
  array->bytes = count * (head[1] / 8);
  tensor->data = allocate(array->bytes, &array->slack);
  get(tensor->data, array->bytes, file);
}

int main(int count, char **arguments) {
  static Array arrays[MOST_ARRAYS];
  TVMFFIAny values[MOST_ARRAYS] = {0}, result = {.type_index = kTVMFFINone};
  TVMFFISafeCallType call = NULL;
  int32_t number;
  if (count != 4) fail("expected NAME OPERANDS RESULTS", "");
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
    if (!strcmp(functions[i].name, arguments[1])) call = functions[i].call;
  if (!call) fail("no such function", arguments[1]);
  FILE *file = fopen(arguments[2], "rb");
  if (!file) fail("cannot open", arguments[2]);
  get(&number, sizeof number, file);
  if (number > MOST_ARRAYS) fail("too many arrays", "");
  for (int i = 0; i < number; i++) {
    read_array(&arrays[i], file);
    values[i].type_index = kTVMFFIDLTensorPtr;
    values[i].v_ptr = &arrays[i].tensor;
  }
  fclose(file);
  if (call(NULL, values, number, &result)) return 1;
  file = fopen(arguments[3], "wb");
  if (!file) fail("cannot open", arguments[3]);
  for (int i = 0; i < number; i++) {
    const unsigned char *data = arrays[i].tensor.data, *end = data + arrays[i].bytes;
    for (size_t j = 0; j < arrays[i].slack; j++)
      if (end[j] != FILL) fail("something was written behind an array", "");
    if (arrays[i].bytes && fwrite(data, arrays[i].bytes, 1, file) != 1) fail("cannot write", arguments[3]);
  }
  return fclose(file) ? 2 : 0;
}
