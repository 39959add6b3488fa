/* A GPU driver's entry points that write down what they are called with, for tests of stored kernels. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static FILE *out(void) { return fopen(getenv("EDGEFORMER_TEST_DRIVER_LOG"), "a"); }

int cuInit(unsigned flags) { FILE *f = out(); fprintf(f, "init %u\n", flags); fclose(f); return 0; }
int cuCtxGetCurrent(void **context) { *context = 0; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 5; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(long)(0x1000 + device); return 0; }
int cuCtxSetCurrent(void *context) { FILE *f = out(); fprintf(f, "context %p\n", context); fclose(f); return 0; }

static int load(void **module, const char *image) {
  FILE *f = out();
  fprintf(f, "load %.3s\n", image + 1); /* both kinds of binary are ELF files */
  fclose(f);
  *module = (void *)0x77;
  return 0;
}
int cuModuleLoadData(void **module, const char *image) { return load(module, image); }
int hipModuleLoadData(void **module, const char *image) { return load(module, image); }

static int function(void **found, void *module, const char *name) {
  FILE *f = out();
  fprintf(f, "function %p %s\n", module, name);
  fclose(f);
  *found = (void *)0x88;
  return strcmp(name, "missing") ? 0 : 500;
}
int cuModuleGetFunction(void **found, void *module, const char *name) { return function(found, module, name); }
int hipModuleGetFunction(void **found, void *module, const char *name) { return function(found, module, name); }
int cuFuncSetAttribute(void *function, int attribute, int value) {
  FILE *f = out();
  fprintf(f, "attribute %p %d %d\n", function, attribute, value);
  fclose(f);
  return 0;
}

static int launch(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void *stream, void **parameters) {
  FILE *f = out();
  fprintf(f, "launch %p %u %u %u %u %u %u %u %p", function, x, y, z, bx, by, bz, shared, stream);
  for (int i = 0; i < 3; i++) fprintf(f, " %p", *(void **)parameters[i]);
  for (int i = 3; i < 6; i++) fprintf(f, " %d", *(int *)parameters[i]);
  for (int i = 6; i < 8; i++) fprintf(f, " %p", *(void **)parameters[i]);
  fprintf(f, "\n");
  fclose(f);
  return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  return launch(function, x, y, z, bx, by, bz, shared, stream, parameters);
}
int hipModuleLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
  return launch(function, x, y, z, bx, by, bz, shared, stream, parameters);
}
