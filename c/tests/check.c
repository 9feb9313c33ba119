/* What a C program may rely on: the scores, from several threads at once, and a code and a text for every mistake.
 *
 *     check MODEL NETWORK DOUBLE DAMAGED IMAGES.f32 SCORES.f32
 *
 * MODEL is a checkpoint, NETWORK a network alone, DOUBLE one of f64, DAMAGED neither; the scores of the images go to a file. */

#undef NDEBUG
#include <assert.h>
#include <gemmnet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 4, BATCH = 3, ROUNDS = 5 };

static const gemmnet_session *session;
static size_t images, image, classes;
static float *x;

static void *read_file(const char *path, size_t *len)
{
    FILE *file = fopen(path, "rb");
    assert(file && fseek(file, 0, SEEK_END) == 0);
    *len = (size_t)ftell(file);
    rewind(file);
    void *bytes = malloc(*len + 1);
    assert(bytes && fread(bytes, 1, *len, file) == *len);
    fclose(file);
    return bytes;
}

static void done(gemmnet_code code)
{
    if (code != GEMMNET_OK)
        fprintf(stderr, "%d: %s\n", (int)code, gemmnet_last_error());
    assert(code == GEMMNET_OK);
}

/* A call that must fail with this code, and a text with this in it. */
static void fails(gemmnet_code code, gemmnet_code want, const char *text)
{
    if (code != want || !strstr(gemmnet_last_error(), text))
        fprintf(stderr, "%d, not %d: %s, not %s\n", (int)code, (int)want, gemmnet_last_error(), text);
    assert(code == want && strstr(gemmnet_last_error(), text));
}

/* The scores of all images, in batches of several sizes. */
static void *score(void *argument)
{
    float *scores = argument;
    gemmnet_scratch *scratch;
    done(gemmnet_scratch_new(session, 1, &scratch));
    for (int round = 0; round < ROUNDS; round++)
        for (size_t first = 0, count; first < images; first += count) {
            count = 1 + (first + (size_t)round) % BATCH;
            count = count < images - first ? count : images - first;
            done(gemmnet_run(session, scratch, x + first * image, count * image, scores + first * classes, count * classes));
        }
    gemmnet_scratch_free(scratch);
    return NULL;
}

static void check_mistakes(char **argv, gemmnet_model *model, gemmnet_session *own)
{
    gemmnet_model *other = model;
    gemmnet_session *second = own;
    gemmnet_scratch *scratch = NULL;
    size_t shape[3], len;
    float scores[2 * BATCH * 10 + 10];

    fails(gemmnet_model_load("there/is/no.such", &other), GEMMNET_IO, "there/is/no.such");
    assert(!other);
    fails(gemmnet_model_load(NULL, &other), GEMMNET_INVALID, "path is NULL");
    fails(gemmnet_model_load(argv[1], NULL), GEMMNET_INVALID, "model is NULL");
    fails(gemmnet_model_load(argv[3], &other), GEMMNET_FORMAT, "f64");
    fails(gemmnet_model_load(argv[4], &other), GEMMNET_FORMAT, argv[4]);
    unsigned char *bytes = read_file(argv[1], &len);
    fails(gemmnet_model_load_buffer(bytes, len - 1, &other), GEMMNET_FORMAT, "the buffer");
    fails(gemmnet_model_load_buffer(bytes, 0, &other), GEMMNET_FORMAT, "the buffer");
    fails(gemmnet_model_load_buffer(NULL, len, &other), GEMMNET_INVALID, "bytes is NULL");
    fails(gemmnet_model_load_buffer(bytes, (size_t)-1, &other), GEMMNET_INVALID, "more than there is memory");
    done(gemmnet_model_load_buffer(bytes, len, &other));
    gemmnet_model_free(other);

    fails(gemmnet_model_input_shape(NULL, shape), GEMMNET_INVALID, "model is NULL");
    fails(gemmnet_model_input_shape(model, NULL), GEMMNET_INVALID, "shape is NULL");
    assert(gemmnet_model_classes(NULL) == 0 && !gemmnet_model_class_name(NULL, 0));
    assert(gemmnet_model_class_name(model, 0) && !gemmnet_model_class_name(model, classes));
    fails(gemmnet_model_normalize(model, bytes, NULL, image), GEMMNET_INVALID, "x is NULL");
    fails(gemmnet_model_normalize(model, bytes, x, image - 1), GEMMNET_SHAPE, "whole number of pictures");
    done(gemmnet_model_load(argv[2], &other));
    fails(gemmnet_model_normalize(other, bytes, x, image), GEMMNET_INVALID, "load a checkpoint");
    assert(!gemmnet_model_class_name(other, 0));
    gemmnet_model_free(other);
    free(bytes);

    fails(gemmnet_session_new(NULL, 1, &second), GEMMNET_INVALID, "model is NULL");
    assert(!second);
    fails(gemmnet_session_new(model, 0, &second), GEMMNET_INVALID, "give at least 1");
    fails(gemmnet_session_new(model, (size_t)-1 / 8, &second), GEMMNET_INVALID, "session");
    fails(gemmnet_session_new(model, 1, NULL), GEMMNET_INVALID, "session is NULL");
    fails(gemmnet_scratch_new(NULL, 1, &scratch), GEMMNET_INVALID, "session is NULL");
    fails(gemmnet_scratch_new(own, 1, NULL), GEMMNET_INVALID, "scratch is NULL");

    done(gemmnet_scratch_new(own, 2, &scratch));
    fails(gemmnet_run(NULL, scratch, x, image, scores, classes), GEMMNET_INVALID, "session is NULL");
    fails(gemmnet_run(own, NULL, x, image, scores, classes), GEMMNET_INVALID, "scratch is NULL");
    fails(gemmnet_run(own, scratch, NULL, image, scores, classes), GEMMNET_INVALID, "x is NULL");
    fails(gemmnet_run(own, scratch, x, image, NULL, classes), GEMMNET_INVALID, "scores is NULL");
    fails(gemmnet_run(own, scratch, (float *)((char *)x + 1), image, scores, classes), GEMMNET_INVALID, "not aligned");
    fails(gemmnet_run(own, scratch, x, image - 1, scores, classes), GEMMNET_SHAPE, "x has shape");
    fails(gemmnet_run(own, scratch, x, image, scores, classes - 1), GEMMNET_SHAPE, "shape");
    fails(gemmnet_run(own, scratch, x, image, x + 1, classes), GEMMNET_INVALID, "overlap");
    fails(gemmnet_run(own, scratch, x, (BATCH + 1) * image, scores, (BATCH + 1) * classes), GEMMNET_INVALID, "more than the 3");
    done(gemmnet_session_new(model, BATCH, &second));
    fails(gemmnet_run(second, scratch, x, image, scores, classes), GEMMNET_INVALID, "another session");
    gemmnet_session_free(second);
    done(gemmnet_run(own, scratch, x, 0, scores, 0));
    done(gemmnet_run(own, scratch, x, image, scores, classes));
    gemmnet_scratch_free(scratch);

    gemmnet_model_free(NULL);
    gemmnet_session_free(NULL);
    gemmnet_scratch_free(NULL);
}

int main(int argc, char **argv)
{
    gemmnet_model *model;
    gemmnet_session *own;
    size_t shape[3], len;
    assert(argc == 7 && gemmnet_abi_version() == GEMMNET_ABI_VERSION && gemmnet_last_error()[0] == 0);
    done(gemmnet_choose_kernels());
    done(gemmnet_model_load(argv[1], &model));
    done(gemmnet_model_input_shape(model, shape));
    image = shape[0] * shape[1] * shape[2];
    classes = gemmnet_model_classes(model);
    x = read_file(argv[5], &len);
    images = len / sizeof *x / image;
    assert(images > BATCH && classes == 10 && len == images * image * sizeof *x);
    done(gemmnet_session_new(model, BATCH, &own));
    session = own;

    float *scores[THREADS];
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        scores[i] = calloc(images * classes, sizeof **scores);
        assert(scores[i] && pthread_create(&threads[i], NULL, score, scores[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++)
        assert(pthread_join(threads[i], NULL) == 0);
    for (int i = 1; i < THREADS; i++)
        assert(memcmp(scores[i], scores[0], images * classes * sizeof **scores) == 0);
    FILE *file = fopen(argv[6], "wb");
    assert(file && fwrite(scores[0], sizeof **scores, images * classes, file) == images * classes && fclose(file) == 0);

    check_mistakes(argv, model, own);
    gemmnet_session_free(own);
    gemmnet_model_free(model);
    for (int i = 0; i < THREADS; i++)
        free(scores[i]);
    free(x);
    return 0;
}
