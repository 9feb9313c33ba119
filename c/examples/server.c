/* A server in small: worker threads take pictures from a common queue and classify them with one session.
 *
 *     cc -O2 server.c -o server $(pkg-config --cflags --libs gemmnet) -pthread
 *     ./server runs/1/model.safetensors data/cifar-10-batches-bin/test_batch.bin 4
 *
 * The queue is a batch of CIFAR-10: records of a label and 3 x 32 x 32 pixels. */

#include <gemmnet.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

enum { PIXELS = 3 * 32 * 32, RECORD = 1 + PIXELS, MOST_THREADS = 64 };

/* What all workers share. Nothing of it changes but the number of the next picture. */
static struct {
    const gemmnet_model *model;
    const gemmnet_session *session;
    unsigned char *records;
    size_t count, classes;
    atomic_size_t next;
} server;

struct worker {
    pthread_t thread;
    size_t done, right;
    int failed;
};

/* Classifies one picture; returns its class, or -1 after a message. */
static int classify(gemmnet_scratch *scratch, const unsigned char *pixels, float *x, float *scores)
{
    if (gemmnet_model_normalize(server.model, pixels, x, PIXELS) != GEMMNET_OK
        || gemmnet_run(server.session, scratch, x, PIXELS, scores, server.classes) != GEMMNET_OK) {
        fprintf(stderr, "%s\n", gemmnet_last_error());
        return -1;
    }
    size_t best = 0;
    for (size_t class = 1; class < server.classes; class++)
        if (scores[class] > scores[best])
            best = class;
    return (int)best;
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    /* The threads are the workers themselves, so that each call has one. */
    gemmnet_scratch *scratch;
    float *x = malloc(PIXELS * sizeof *x), *scores = malloc(server.classes * sizeof *scores);
    worker->failed = !x || !scores || gemmnet_scratch_new(server.session, 1, &scratch) != GEMMNET_OK;
    if (worker->failed) {
        fprintf(stderr, "a worker cannot start: %s\n", gemmnet_last_error());
    } else {
        for (size_t i; !worker->failed && (i = atomic_fetch_add(&server.next, 1)) < server.count;) {
            const unsigned char *record = server.records + i * RECORD;
            int class = classify(scratch, record + 1, x, scores);
            worker->failed = class < 0;
            worker->done++;
            worker->right += class == record[0];
        }
        gemmnet_scratch_free(scratch);
    }
    free(x);
    free(scores);
    return NULL;
}

/* Reads the records of a file; 0 after a message. */
static int read_records(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0) {
        perror(path);
        return 0;
    }
    long len = ftell(file);
    rewind(file);
    if (len <= 0 || len % RECORD != 0) {
        fprintf(stderr, "%s: %ld bytes are no whole records of %d\n", path, len, RECORD);
        fclose(file);
        return 0;
    }
    server.count = (size_t)len / RECORD;
    server.records = malloc((size_t)len);
    int read = server.records && fread(server.records, RECORD, server.count, file) == server.count;
    if (!read)
        fprintf(stderr, "%s: cannot be read\n", path);
    fclose(file);
    return read;
}

int main(int argc, char **argv)
{
    int threads = argc == 4 ? atoi(argv[3]) : 0;
    if (threads < 1 || threads > MOST_THREADS) {
        fprintf(stderr, "usage: %s MODEL BATCH.bin THREADS (1 to %d)\n", argv[0], MOST_THREADS);
        return 2;
    }
    /* First thing, while there is one thread. */
    if (gemmnet_choose_kernels() != GEMMNET_OK) {
        fprintf(stderr, "%s\n", gemmnet_last_error());
        return 1;
    }
    gemmnet_model *model = NULL;
    gemmnet_session *session = NULL;
    size_t shape[3], failed = 1;
    if (gemmnet_model_load(argv[1], &model) != GEMMNET_OK || gemmnet_model_input_shape(model, shape) != GEMMNET_OK
        || gemmnet_session_new(model, 1, &session) != GEMMNET_OK) {
        fprintf(stderr, "%s\n", gemmnet_last_error());
    } else if (shape[0] * shape[1] * shape[2] != PIXELS) {
        fprintf(stderr, "%s: takes other pictures than CIFAR-10's\n", argv[1]);
    } else if (read_records(argv[2])) {
        struct worker workers[MOST_THREADS] = {0};
        size_t done = 0, right = 0;
        server.model = model;
        server.session = session;
        server.classes = gemmnet_model_classes(model);
        failed = 0;
        int started = 0;
        while (started < threads && pthread_create(&workers[started].thread, NULL, work, &workers[started]) == 0)
            started++;
        for (int i = 0; i < started; i++) {
            pthread_join(workers[i].thread, NULL);
            done += workers[i].done;
            right += workers[i].right;
            failed += (size_t)workers[i].failed;
        }
        failed += started < threads;
        printf("%zu of %zu pictures classified by %d threads, %zu as labelled\n", done, server.count, started, right);
    }
    free(server.records);
    gemmnet_session_free(session);
    gemmnet_model_free(model);
    return failed ? 1 : 0;
}
