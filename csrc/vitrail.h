/* libvitrail: embeds images and texts, and classifies images, with a model that `vitrail export`
 * wrote, on an NVIDIA GPU, with no Python and no CUDA toolkit; the driver is opened at run time.
 *
 *     vitrail_model* model;
 *     vitrail_session* session;
 *     if (vitrail_load("folder", NULL, &model) != VITRAIL_OK) { puts(vitrail_error()); return 1; }
 *     vitrail_session_create(model, &session);
 *     vitrail_embed_uint8(session, pixels, n, embeddings, NULL);
 *
 * A model may be used from any number of threads. A session has a stream and memory of its own,
 * which grow to the largest call and stay; calls of one session wait for each other, those of
 * different sessions run at once. No function throws, aborts, or changes the caller's current
 * CUDA context. A process must not fork after vitrail_load and use CUDA in the child. */
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
    VITRAIL_BAD_FOLDER = 2,    /* not an export, damaged, or for another version or device */
    VITRAIL_NO_DEVICE = 3,     /* no NVIDIA driver, or no such device */
    VITRAIL_DEVICE = 4,        /* the driver failed; again and again where the device is lost */
    VITRAIL_OUT_OF_MEMORY = 5, /* one item alone, or the weights, do not fit */
    VITRAIL_NOT_FINITE = 6,    /* an item's embedding or scores hold NaN or infinity */
    VITRAIL_FAILED = 7         /* anything else */
} vitrail_status;

typedef struct vitrail_model vitrail_model;
typedef struct vitrail_session vitrail_session;

/* All zeros, or no options at all, are the defaults. */
typedef struct vitrail_options {
    int device;         /* its number, as the driver counts */
    const char* driver; /* path of the driver's library; NULL: libcuda.so.1 */
    int overlap;        /* 1: kernels are launched before the one before has ended (sm_90 and on) */
} vitrail_options;

/* Sizes are 0 for what the model does not take. Strings are the model's, until vitrail_free. */
typedef struct vitrail_facts {
    uint32_t image_height, image_width, image_channels;
    uint32_t image_embedding; /* D of an image */
    uint32_t image_labels;    /* classes; 0: the model has no classification head */
    const char* image_scores; /* what makes probabilities of logits: "softmax", "sigmoid" for labels
                                 that do not exclude one another, "none"; NULL without classes */
    uint32_t text_vocab;      /* ids are 0 to this - 1 */
    uint32_t text_context;    /* most ids of a text */
    uint32_t text_embedding;  /* D of a text */
    int32_t text_end;         /* id that ends a text; -1: the first of its highest */
    uint32_t architecture;    /* in use, 10 * major + minor: 90 for sm_90 */
    const char* device;       /* its name */
    const char* fingerprint;  /* equal numbers follow from equal fingerprints; of the model with the
                                 kernels of this architecture, as Python's Model.fingerprint */
} vitrail_facts;

/* Of this library; exported folders of another are refused. */
VITRAIL_API const char* vitrail_version(void);

/* Why this thread's latest call that failed did: what was got, what was wanted, where. The text
 * is the thread's own, until its next failure. */
VITRAIL_API const char* vitrail_error(void);

/* Opens an exported folder: every file that is used is checked against its digest, and the weights
 * go to the device. `options` may be NULL. `*model` is NULL where it fails.
 * VITRAIL_INVALID, _BAD_FOLDER, _NO_DEVICE, _DEVICE, _OUT_OF_MEMORY. */
VITRAIL_API vitrail_status vitrail_load(const char* folder, const vitrail_options* options,
                                        vitrail_model** model);

/* Sessions may outlive it: the weights go with the last of them. NULL is fine. */
VITRAIL_API void vitrail_free(vitrail_model* model);

VITRAIL_API vitrail_status vitrail_model_facts(const vitrail_model* model, vitrail_facts* facts);

/* The name of a class, in UTF-8, the model's until vitrail_free; NULL past the last. */
VITRAIL_API const char* vitrail_label(const vitrail_model* model, size_t number);

/* `*session` is NULL where it fails. VITRAIL_INVALID, _DEVICE, _OUT_OF_MEMORY. */
VITRAIL_API vitrail_status vitrail_session_create(const vitrail_model* model,
                                                  vitrail_session** session);

/* No call of it may be running. NULL is fine. */
VITRAIL_API void vitrail_session_free(vitrail_session* session);

/* The embed functions take `n` items, none to any number, and write `embeddings` (n, D) float32:
 * as encode_image and encode_text give them, not normalised. Memory is the host's, contiguous, and
 * the work is done when they return. `status` (n,) gets 0 for each item that is finite; with NULL
 * an item that is not is VITRAIL_NOT_FINITE, which names the first, and all are written.
 *
 * Where device memory lacks, the session's own is freed and the items go through in halves: the
 * same bits, as an item's do not depend on the others. VITRAIL_OUT_OF_MEMORY: one alone does not
 * fit. After another failure the embeddings may be written in part. The session goes on working
 * unless the device is lost.
 * VITRAIL_INVALID, _DEVICE, _OUT_OF_MEMORY, _NOT_FINITE. */

/* `pixels` (n, height, width, channels) uint8, resized and cropped, not normalised. */
VITRAIL_API vitrail_status vitrail_embed_uint8(vitrail_session* session, const uint8_t* pixels,
                                               size_t n, float* embeddings, int32_t* status);

/* `pixels` (n, channels, height, width) float32, normalised. */
VITRAIL_API vitrail_status vitrail_embed_float(vitrail_session* session, const float* pixels,
                                               size_t n, float* embeddings, int32_t* status);

/* `ids` (n, stride) int32, of which a text's are the first `lengths[i]` of its row; `lengths` NULL:
 * all `stride`. What follows a text's end token is not looked at by the model; a text without one
 * is VITRAIL_INVALID, as is an id or a length out of range. */
VITRAIL_API vitrail_status vitrail_embed_text(vitrail_session* session, const int32_t* ids,
                                              size_t stride, const int32_t* lengths, size_t n,
                                              float* embeddings, int32_t* status);

/* The same for a model with a classification head, but `logits` (n, image_labels) float32: class
 * scores, as classify gives them. */
VITRAIL_API vitrail_status vitrail_classify_uint8(vitrail_session* session, const uint8_t* pixels,
                                                  size_t n, float* logits, int32_t* status);

VITRAIL_API vitrail_status vitrail_classify_float(vitrail_session* session, const float* pixels,
                                                  size_t n, float* logits, int32_t* status);

#ifdef __cplusplus
}
#endif

#endif
