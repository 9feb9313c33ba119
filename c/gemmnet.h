/* gemmnet: networks for pictures, from C.
 *
 * A model is what a file holds; a session is a model ready to run; a scratch is the memory and the threads of one caller.
 *
 *     gemmnet_model *model;
 *     gemmnet_session *session;
 *     gemmnet_scratch *scratch;
 *     if (gemmnet_model_load("model.safetensors", &model) || gemmnet_session_new(model, 8, &session)
 *         || gemmnet_scratch_new(session, 1, &scratch) || gemmnet_run(session, scratch, x, x_len, scores, scores_len))
 *         fprintf(stderr, "%s\n", gemmnet_last_error());
 *
 * Every function that can fail returns a code of enum gemmnet_code, and the text of gemmnet_last_error() tells what came, what
 * was expected, and what to do. A model or session may be used by any number of threads at once, a scratch by one at a time.
 * Nothing is kept of a model once a session is made of it, and nothing of a caller's buffer after a call.
 */
/* Made by cbindgen of c/src/lib.rs: change it there. */

#ifndef GEMMNET_H
#define GEMMNET_H

#include <stddef.h>
#include <stdint.h>

/*
 The version of this interface: it grows when programs that were compiled for an earlier one would no longer work.
 */
#define GEMMNET_ABI_VERSION 1

/*
 What became of a call.
 */
typedef enum {
  /*
   Done.
   */
  GEMMNET_OK = 0,
  /*
   An argument makes no sense, such as NULL or a batch of 0.
   */
  GEMMNET_INVALID = 1,
  /*
   A buffer does not have the length that the network needs.
   */
  GEMMNET_SHAPE = 2,
  /*
   A file cannot be read.
   */
  GEMMNET_IO = 3,
  /*
   A file or buffer does not hold a network, or a damaged one.
   */
  GEMMNET_FORMAT = 4,
  /*
   No memory left, or a bug in gemmnet: the text says which. What the call was given can still be freed.
   */
  GEMMNET_PANIC = 5,
} gemmnet_code;

/*
 What a file holds: a network with its parameters, and if it is a checkpoint, what turns pixels into its input and the names
 of its classes.
 */
typedef struct gemmnet_model gemmnet_model;

/*
 The memory and the threads of one caller of a session.
 */
typedef struct gemmnet_scratch gemmnet_scratch;

/*
 A model ready to run on batches up to a size: immutable, so any number of threads may use it at once.
 */
typedef struct gemmnet_session gemmnet_session;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 The version of the interface that the library has; a program that wants to be sure compares it with
 GEMMNET_ABI_VERSION, that of the header that it was compiled with.
 */
uint32_t gemmnet_abi_version(void);

/*
 The text of the last error on the calling thread, in UTF-8; empty before the first. Valid until the next error on this
 thread.
 */
const char *gemmnet_last_error(void);

/*
 Where OpenBLAS is older than the processor, and so runs several times slower than it could, makes it choose better kernels. It
 changes the environment for a moment, so it is for a program that calls it first thing, while it has one thread.
 */
gemmnet_code gemmnet_choose_kernels(void);

/*
 Reads the file at `path`, which `gemmnet train` or the library saved, into `*model`.

 # Safety
 `path` is NULL or ends with a zero; `model` is NULL or may be written to.
 */
gemmnet_code gemmnet_model_load(const char *path, gemmnet_model **model);

/*
 The same from the `len` bytes of such a file, which are not needed afterwards.

 # Safety
 `bytes` is NULL or has `len` bytes; `model` is NULL or may be written to.
 */
gemmnet_code gemmnet_model_load_buffer(const uint8_t *bytes, size_t len, gemmnet_model **model);

/*
 Frees a model; NULL is none.

 # Safety
 It is not used afterwards.
 */
void gemmnet_model_free(gemmnet_model *model);

/*
 Channels, height and width of the pictures that the network takes, into `shape`.

 # Safety
 `model` is NULL or one; `shape` is NULL or has 3 elements.
 */
gemmnet_code gemmnet_model_input_shape(const gemmnet_model *model, size_t *shape);

/*
 The number of classes, which is that of the scores of a picture; 0 for NULL.

 # Safety
 `model` is NULL or one.
 */
size_t gemmnet_model_classes(const gemmnet_model *model);

/*
 The name of class `index`, in UTF-8, as long as the model is not freed; NULL if it has none.

 # Safety
 `model` is NULL or one.
 */
const char *gemmnet_model_class_name(const gemmnet_model *model, size_t index);

/*
 Turns pictures of bytes, channel by channel and row by row, into the network's input, as it was trained: `x` gets `len`
 values for `len` pixels. Only a checkpoint says how.

 # Safety
 `model` is NULL or one; `pixels` and `x` are NULL or have `len` elements each.
 */
gemmnet_code gemmnet_model_normalize(const gemmnet_model *model, const uint8_t *pixels, float *x, size_t len);

/*
 Makes a model ready to run on up to `batch` pictures at once. The model may be freed afterwards. Scores of sessions for
 other batches may differ in rounding.

 # Safety
 `model` is NULL or one; `session` is NULL or may be written to.
 */
gemmnet_code gemmnet_session_new(const gemmnet_model *model, size_t batch, gemmnet_session **session);

/*
 Frees a session; NULL is none.

 # Safety
 Neither it nor a scratch of it is used afterwards, but to free that.
 */
void gemmnet_session_free(gemmnet_session *session);

/*
 Makes the memory for one caller of a session, and starts `threads` threads for its calls; none for 1, which run on the
 thread that makes them. 0 is one thread for each core, or as many as GEMMNET_NUM_THREADS says.

 # Safety
 `session` is NULL or one; `scratch` is NULL or may be written to.
 */
gemmnet_code gemmnet_scratch_new(const gemmnet_session *session, size_t threads, gemmnet_scratch **scratch);

/*
 Frees a scratch; NULL is none.

 # Safety
 It is not used afterwards.
 */
void gemmnet_scratch_free(gemmnet_scratch *scratch);

/*
 Scores of pictures: `x` holds their `x_len` values, picture by picture, channel by channel, row by row, and `scores` gets
 one row of `scores_len` / classes values for each. The number of pictures is up to the session's batch. Scores of a
 picture do not depend on the others, but for rounding where OpenBLAS has no AVX-512 kernels.

 # Safety
 `session` and `scratch` are NULL or such; `x` and `scores` are NULL or have so many elements, which nobody else writes
 during the call.
 */
gemmnet_code gemmnet_run(const gemmnet_session *session,
                         const gemmnet_scratch *scratch,
                         const float *x,
                         size_t x_len,
                         float *scores,
                         size_t scores_len);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* GEMMNET_H */
