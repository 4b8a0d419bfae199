/* libvitrail runs a model that `vitrail export` wrote, on an NVIDIA GPU: it embeds images and
 * texts, and classifies images. It needs neither Python nor the CUDA toolkit; the driver's library
 * is opened at run time.
 *
 *     vitrail_model* model;
 *     vitrail_session* session;
 *     if (vitrail_load("folder", NULL, &model) != VITRAIL_OK) { puts(vitrail_error()); return 1; }
 *     vitrail_session_create(model, &session);
 *     vitrail_embed_uint8(session, pixels, n, embeddings, NULL);
 *
 * Any number of threads may use a model. Calls of one session run one after another; different
 * sessions run at the same time. Device memory for calls grows to the largest call and stays;
 * between calls it belongs to no session, and all sessions on the device use it. No function
 * throws, aborts, or changes the caller's current CUDA context. In a process that is forked after
 * vitrail_load, loading, embedding and classifying fail with VITRAIL_DEVICE: CUDA does not survive
 * a fork. */
#ifndef VITRAIL_H
#define VITRAIL_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define VITRAIL_API __attribute__((visibility("default")))
#else
#define VITRAIL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum vitrail_status {
    VITRAIL_OK = 0,
    VITRAIL_INVALID = 1,       /* an argument is wrong */
    VITRAIL_BAD_FOLDER = 2,    /* not an export, damaged, of other numbers, or for another device */
    VITRAIL_NO_DEVICE = 3,     /* no NVIDIA driver, or no such device */
    VITRAIL_DEVICE = 4,        /* the driver failed; if the device is lost, all later calls fail */
    VITRAIL_OUT_OF_MEMORY = 5, /* the weights, or even one item, do not fit into memory */
    VITRAIL_NOT_FINITE = 6,    /* an item's embedding or scores hold NaN or infinity */
    VITRAIL_FAILED = 7         /* any other failure */
} vitrail_status;

typedef struct vitrail_model vitrail_model;
typedef struct vitrail_session vitrail_session;

/* Every default is zero. A NULL pointer to the options means all defaults. */
typedef struct vitrail_options {
    int device;         /* the driver's number of the device */
    const char* driver; /* path of the driver's library; NULL: libcuda.so.1 */
    int overlap;        /* 1: a kernel may start before the previous one ends (sm_90 or later) */
} vitrail_options;

/* Sizes are 0 for inputs that the model does not take. Strings belong to the model and live until
 * vitrail_free. */
typedef struct vitrail_facts {
    uint32_t image_height, image_width, image_channels;
    uint32_t image_embedding; /* D of an image embedding */
    uint32_t image_labels;    /* number of classes; 0 without a classification head */
    const char* image_scores; /* the function from logits to probabilities: "softmax", "sigmoid" (an
                                 image may have several labels) or "none"; NULL without classes */
    uint32_t text_vocab;      /* ids are 0 to text_vocab - 1 */
    uint32_t text_context;    /* the most ids of a text */
    uint32_t text_embedding;  /* D of a text embedding */
    int32_t text_end;         /* the id that ends a text; -1: the first of the text's highest ids */
    uint32_t architecture;    /* of the device, 10 * major + minor: 90 for sm_90 */
    const char* device;       /* name of the device */
    const char* fingerprint;  /* of the model with this architecture's kernels, like Python's
                                 Model.fingerprint: equal fingerprints mean equal results */
} vitrail_facts;

/* The version of this library. It loads folders that any version exported, if their plan grammar
 * and their kernel ABI are its own; vitrail.json has these two numbers of a folder. A folder keeps
 * its fingerprint. */
VITRAIL_API const char* vitrail_version(void);

/* The message of this thread's latest failure: what was got, what was wanted, and where. The string
 * belongs to the thread and lives until its next failure. */
VITRAIL_API const char* vitrail_error(void);

/* Opens an exported folder and copies its weights to the device. Checks the digest of every file
 * that it uses. `options` may be NULL. On failure, `*model` is NULL. Failures: VITRAIL_INVALID,
 * _BAD_FOLDER, _NO_DEVICE, _DEVICE, _OUT_OF_MEMORY. */
VITRAIL_API vitrail_status vitrail_load(const char* folder, const vitrail_options* options,
                                        vitrail_model** model);

/* Sessions of the model stay usable; freeing the last session frees the weights. `model` may be
 * NULL. */
VITRAIL_API void vitrail_free(vitrail_model* model);

VITRAIL_API vitrail_status vitrail_model_facts(const vitrail_model* model, vitrail_facts* facts);

/* The name of class `index` in UTF-8; NULL past the last class. The string lives until
 * vitrail_free. */
VITRAIL_API const char* vitrail_label(const vitrail_model* model, size_t index);

/* On failure, `*session` is NULL. Failures: VITRAIL_INVALID, _DEVICE, _OUT_OF_MEMORY. */
VITRAIL_API vitrail_status vitrail_session_create(const vitrail_model* model,
                                                  vitrail_session** session);

/* No call of the session may be running. `session` may be NULL. */
VITRAIL_API void vitrail_session_free(vitrail_session* session);

/* The most device memory that a call of the session uses beside the weights, in bytes; 0, the
 * default: no limit. Calls run fewer items at a time, to the same bits. A call whose single item
 * needs more is VITRAIL_OUT_OF_MEMORY; the message says how much. Waits for a call that is
 * running. */
VITRAIL_API vitrail_status vitrail_session_limit(vitrail_session* session, size_t bytes);

/* Device bytes beside the weights that calls use, or used and left for the next: of all sessions on
 * the session's device. The second function frees those that no call is using, and returns how many
 * they were; the next call allocates again, and gives the same bits. 0 for NULL. Any thread may ask
 * at any time. */
VITRAIL_API size_t vitrail_session_memory(const vitrail_session* session);
VITRAIL_API size_t vitrail_session_trim(vitrail_session* session);

/* The embed functions take any number of items, `n`, and write `embeddings` (n, D) float32, like
 * Python's encode_image and encode_text without normalization. All arrays are contiguous host
 * memory. The functions return when the results are written. `status` (n,) is set to 0 for each
 * item whose embedding is finite. If `status` is NULL, an embedding that is not finite gives
 * VITRAIL_NOT_FINITE: the message names the first such item, and all embeddings are written.
 *
 * If device memory runs out, the session frees what no other call uses and runs half as many items
 * at a time. The bits stay the same: an item's result does not depend on the other items.
 * VITRAIL_OUT_OF_MEMORY means that even one item does not fit. After any other failure some
 * embeddings may be written. The session stays usable unless the device is lost. Failures:
 * VITRAIL_INVALID, _DEVICE, _OUT_OF_MEMORY, _NOT_FINITE. */

/* `pixels` (n, height, width, channels) uint8: resized and cropped, not normalized. */
VITRAIL_API vitrail_status vitrail_embed_uint8(vitrail_session* session, const uint8_t* pixels,
                                               size_t n, float* embeddings, int32_t* status);

/* `pixels` (n, channels, height, width) float32: normalized. */
VITRAIL_API vitrail_status vitrail_embed_float(vitrail_session* session, const float* pixels,
                                               size_t n, float* embeddings, int32_t* status);

/* `ids` (n, stride) int32. The first `lengths[i]` ids of row i are its text; if `lengths` is NULL,
 * the whole row is. The model ignores ids after a text's end token. A text without an end token, an
 * id out of range or a length out of range is VITRAIL_INVALID. */
VITRAIL_API vitrail_status vitrail_embed_text(vitrail_session* session, const int32_t* ids,
                                              size_t stride, const int32_t* lengths, size_t n,
                                              float* embeddings, int32_t* status);

/* Like the embed functions, for a model with a classification head: `logits` (n, image_labels)
 * float32 are class scores, like those of Python's classify. */
VITRAIL_API vitrail_status vitrail_classify_uint8(vitrail_session* session, const uint8_t* pixels,
                                                  size_t n, float* logits, int32_t* status);

VITRAIL_API vitrail_status vitrail_classify_float(vitrail_session* session, const float* pixels,
                                                  size_t n, float* logits, int32_t* status);

#ifdef __cplusplus
}
#endif

#endif
