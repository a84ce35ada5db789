/* A libcuda.so.1 without a card, over which the real comfy-aimdo runs.
 *
 * It counts device memory and refuses what goes beyond the size that a test sets. It copies
 * nothing, and every event is done at once. A device pointer is a key that is never read through.
 *
 * Built with -O0: comfy-aimdo hooks the allocation functions by overwriting their first bytes, so
 * each must be long enough and must stay a function of its own.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ASK_PER_THREAD_STREAM 2

enum status { OK = 0, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };

typedef uint64_t handle; /* a CUdeviceptr or CUmemGenericAllocationHandle: address of its size */

static size_t card_bytes = (size_t)8 << 30;
static size_t used_bytes;

/* For tests. */
void fake_set_card(size_t bytes) { card_bytes = bytes; }
size_t fake_used(void) { return used_bytes; }

static int allocate(handle *out, size_t bytes)
{
    if (bytes > card_bytes || used_bytes > card_bytes - bytes)
        return OUT_OF_MEMORY;
    size_t *size = malloc(sizeof *size);
    *size = bytes;
    used_bytes += bytes;
    *out = (handle)(uintptr_t)size;
    return OK;
}

static int release(handle given)
{
    size_t *size = (size_t *)(uintptr_t)given;
    if (size) {
        used_bytes -= *size;
        free(size);
    }
    return OK;
}

/* Hooked by comfy-aimdo. */
int cuMemAlloc_v2(handle *out, size_t bytes) { return allocate(out, bytes); }
int cuMemFree_v2(handle given) { return release(given); }
int cuMemAllocAsync(handle *out, size_t bytes, void *stream)
{
    (void)stream;
    return allocate(out, bytes);
}
int cuMemFreeAsync(handle given, void *stream)
{
    (void)stream;
    return release(given);
}
int cuMemAllocAsync_ptsz(handle *out, size_t bytes, void *stream)
{
    (void)stream;
    return allocate(out, bytes);
}
int cuMemFreeAsync_ptsz(handle given, void *stream)
{
    (void)stream;
    return release(given);
}

/* Pages: physical memory counts when it is made; addresses are only reserved. */
static int create(handle *out, size_t bytes, const void *kind, unsigned long long flags)
{
    (void)kind;
    (void)flags;
    return allocate(out, bytes);
}

static int reserve(handle *out, size_t bytes, size_t align, handle wish, unsigned long long flags)
{
    (void)align;
    (void)wish;
    (void)flags;
    int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *place = mmap(NULL, bytes, PROT_NONE, how, -1, 0);
    *out = (handle)(uintptr_t)place;
    return place == MAP_FAILED ? OUT_OF_MEMORY : OK;
}

static int unreserve(handle place, size_t bytes)
{
    return munmap((void *)(uintptr_t)place, bytes);
}

/* Questions. */
static int memory_info(size_t *free_bytes, size_t *total)
{
    *free_bytes = card_bytes > used_bytes ? card_bytes - used_bytes : 0;
    *total = card_bytes;
    return OK;
}

static int total_memory(size_t *bytes, int device)
{
    (void)device;
    *bytes = card_bytes;
    return OK;
}

static int get_device(int *device, int ordinal)
{
    *device = ordinal;
    return OK;
}

static int current_device(int *device)
{
    *device = 0;
    return OK;
}

static int attribute(int *value, int which, int device)
{
    (void)which;
    (void)device;
    *value = 0;
    return OK;
}

static int device_name(char *name, int size, int device)
{
    (void)device;
    snprintf(name, size, "fake card");
    return OK;
}

static int device_uuid(void *uuid, int device)
{
    (void)device;
    memset(uuid, 1, 16);
    return OK;
}

static int error_string(int error, const char **text)
{
    (void)error;
    *text = "the fake card refused";
    return OK;
}

/* Pinned memory and events. */
static int host_allocate(void **out, size_t bytes)
{
    *out = malloc(bytes);
    return OK;
}

static int host_free(void *place)
{
    free(place);
    return OK;
}

static int event_create(void **event, unsigned flags)
{
    (void)flags;
    *event = malloc(1);
    return OK;
}

static int event_destroy(void *event)
{
    free(event);
    return OK;
}

static int succeed(void) { return OK; } /* whatever the arguments */

static const struct {
    const char *name;
    void *function;
} driver[] = {
    {"cuMemAlloc", cuMemAlloc_v2},
    {"cuMemFree", cuMemFree_v2},
    {"cuMemAllocAsync", cuMemAllocAsync},
    {"cuMemFreeAsync", cuMemFreeAsync},
    {"cuMemAllocAsync_ptsz", cuMemAllocAsync_ptsz},
    {"cuMemFreeAsync_ptsz", cuMemFreeAsync_ptsz},
    {"cuMemCreate", create},
    {"cuMemRelease", release},
    {"cuMemAddressReserve", reserve},
    {"cuMemAddressFree", unreserve},
    {"cuMemGetInfo", memory_info},
    {"cuDeviceTotalMem", total_memory},
    {"cuDeviceGet", get_device},
    {"cuCtxGetDevice", current_device},
    {"cuDeviceGetAttribute", attribute},
    {"cuDeviceGetName", device_name},
    {"cuDeviceGetUuid", device_uuid},
    {"cuGetErrorString", error_string},
    {"cuMemAllocHost", host_allocate},
    {"cuMemFreeHost", host_free},
    {"cuEventCreate", event_create},
    {"cuEventDestroy", event_destroy},
    {"cuInit", succeed},
    {"cuMemMap", succeed},
    {"cuMemSetAccess", succeed},
    {"cuMemUnmap", succeed},
    {"cuCtxSynchronize", succeed},
    {"cuMemHostRegister", succeed},
    {"cuMemHostUnregister", succeed},
    {"cuMemcpyHtoDAsync", succeed},
    {"cuMemcpyDtoHAsync", succeed},
    {"cuEventRecord", succeed},
    {"cuEventSynchronize", succeed},
};

/* comfy-aimdo finds all others through this one. */
int cuGetProcAddress(const char *name, void **out, int version, uint64_t flags, void *status)
{
    (void)version;
    (void)status;
    char wanted[64];
    int is_stream = strstr(name, "Async") && strncmp(name, "cuMemcpy", 8) != 0;
    int is_per_thread = (flags & ASK_PER_THREAD_STREAM) && is_stream;
    snprintf(wanted, sizeof wanted, "%s%s", name, is_per_thread ? "_ptsz" : "");
    for (size_t i = 0; i < sizeof driver / sizeof driver[0]; i++) {
        if (strcmp(driver[i].name, wanted) == 0) {
            *out = driver[i].function;
            return OK;
        }
    }
    fprintf(stderr, "fake_cuda.c has no %s\n", wanted);
    return NOT_FOUND;
}
