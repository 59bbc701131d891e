/* The optimizers' passes on a CPU, as loops that the compiler can vectorise.
 *
 * The arithmetic is that of operators/optim/adamw.py and merger.py. Every operation is correctly
 * rounded, and operations are fused only where fmaf is written. So an element's bits depend neither
 * on the vector width nor on where ranges begin. */

#include <math.h>

#include "selection.h"

/* The numbers of a step. */
typedef struct {
    float take;          /* 1 - beta1 */
    float keep_square;   /* beta2 */
    float take_square;   /* 1 - beta2 */
    float eps;
    float scale;         /* minus the step size */
    float root;          /* square root of the second moment's bias correction */
    float decay;
    float update_weight; /* 1 - a */
    float tau_weight;    /* a */
    float cut;           /* the smallest magnitude that top-p keeps */
} Numbers;

/* A flat range of a parameter: `size` elements from the global index `start` on. */
typedef struct {
    int64_t size;
    uint64_t start;
    float *theta;
    const float *gradient;
    float *mean, *square;
    const Numbers *numbers;
} Range;

/* One random mask of a step: the key of the counter hash, and the largest word that is kept. */
typedef struct {
    uint32_t key[2], largest;
} Draw;

enum { NO_TAU = 0, BFLOAT16 = 2, FLOAT32 = 4 }; /* bytes of an element of tau */

/* What AdamW adds, without decay. */
static inline float update_of(float mean, float square, const Numbers *n) {
    return mean * n->scale / (sqrtf(square) / n->root + n->eps);
}

/* Updates both moments with a gradient and returns what AdamW then adds. Operations are fused where
 * torch's lerp and addcmul fuse them, so the moments have the eager path's bits. (The square root
 * in update_of may differ from the eager path's in the last bit.) */
static inline float advance(float gradient, float *mean, float *square, const Numbers *n) {
    *mean = fmaf(n->take, gradient - *mean, *mean);
    *square = fmaf(n->take_square * gradient, gradient, *square * n->keep_square);
    return update_of(*mean, *square, n);
}

static inline float tau_at(const void *tau, int width, int64_t i) {
    if (width == NO_TAU) return 0.0f;
    if (width == FLOAT32) return ((const float *)tau)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)tau)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Eq. 7: the sum where signs agree or one is zero, else the larger magnitude (0 if both are equal). */
static inline float consensus(float change, float drift) {
    int against = ((change > 0.0f) & (drift < 0.0f)) | ((change < 0.0f) & (drift > 0.0f));
    float stronger = fabsf(drift) > fabsf(change) ? drift : change;
    stronger = fabsf(drift) == fabsf(change) ? 0.0f : stronger;
    return against ? stronger : change + drift;
}

/* theta = theta * decay + change. counts[1] counts the elements with a nonzero change, counts[0]
 * those of them that rounding left unchanged. */
static inline void write(float *theta, float change, const Numbers *n, int counting,
                         int64_t *counts) {
    float before = *theta * n->decay, after = before + change;
    *theta = after;
    if (counting) {
        counts[0] += (change != 0.0f) & (after == before);
        counts[1] += change != 0.0f;
    }
}

/* AdamW. */
void plain_step(const Range *range) {
    const Numbers n = *range->numbers;
    float *restrict theta = range->theta, *restrict mean = range->mean;
    float *restrict square = range->square;
    const float *restrict gradient = range->gradient;
    for (int64_t i = 0; i < range->size; i++) {
        float m = mean[i], s = square[i];
        float change = advance(gradient[i], &m, &s, &n);
        mean[i] = m;
        square[i] = s;
        theta[i] = theta[i] * n.decay + change;
    }
}

/* Compiles a loop once for each combination of tau's width and `counting`, and calls the right one. */
#define CHOOSE(loop, ...)                                                                          \
    do {                                                                                           \
        if (tau_width == BFLOAT16 && counting) loop(__VA_ARGS__, BFLOAT16, 1);                     \
        else if (tau_width == BFLOAT16) loop(__VA_ARGS__, BFLOAT16, 0);                            \
        else if (tau_width == FLOAT32 && counting) loop(__VA_ARGS__, FLOAT32, 1);                  \
        else if (tau_width == FLOAT32) loop(__VA_ARGS__, FLOAT32, 0);                              \
        else if (counting) loop(__VA_ARGS__, NO_TAU, 1);                                           \
        else loop(__VA_ARGS__, NO_TAU, 0);                                                         \
    } while (0)
#define LOOP static inline __attribute__((always_inline)) void

LOOP dare_loop(const Range *range, const void *restrict tau, const Draw *draws, int64_t *counts,
               int tau_width, int counting) {
    const Numbers n = *range->numbers;
    float *restrict theta = range->theta, *restrict mean = range->mean;
    float *restrict square = range->square;
    const float *restrict gradient = range->gradient;
    int64_t count[2] = {0, 0};
    for (int64_t first = 0; first < range->size;) {
        const uint64_t index = range->start + (uint64_t)first;
        const int64_t same_upper_bits = first + 0x10000 - (int64_t)(index & 0xffff);
        const int64_t end = same_upper_bits < range->size ? same_upper_bits : range->size;
        const Mask of_update = prepared_mask(index, draws[0].key, draws[0].largest);
        const Mask of_tau = prepared_mask(index, draws[1].key, draws[1].largest);
        for (int64_t i = first; i < end; i++) {
            const uint32_t here = (uint32_t)range->start + (uint32_t)i;
            float m = mean[i], s = square[i];
            float update = advance(gradient[i], &m, &s, &n);
            mean[i] = m;
            square[i] = s;
            float change = (is_kept(here, of_update) ? update : 0.0f) * n.update_weight;
            if (tau_width != NO_TAU) {
                float drift = tau_at(tau, tau_width, i);
                change = fmaf(is_kept(here, of_tau) ? drift : 0.0f, n.tau_weight, change);
            }
            write(theta + i, change, &n, counting, count);
        }
        first = end;
    }
    memcpy(counts, count, sizeof count);
}

/* OnDARE around AdamW in one pass; draws[0] is the mask of the update, draws[1] of tau. */
void dare_step(const Range *range, const void *tau, int tau_width, const Draw *draws, int counting,
               int64_t *counts) {
    CHOOSE(dare_loop, range, tau, draws, counts);
}

/* OnTIES' first pass: advances the moments, and with a look counts the magnitudes of the update. */
void ties_advance(const Range *range, Look *look) {
    const Numbers n = *range->numbers;
    float *restrict mean = range->mean, *restrict square = range->square;
    const float *restrict gradient = range->gradient;
    Look own = {0};
    if (look) own = *look;
    for (int64_t first = 0; first < range->size; first += BLOCK) {
        const int64_t left = range->size - first;
        const int length = left < BLOCK ? (int)left : BLOCK;
        uint32_t magnitude[BLOCK];
        for (int i = 0; i < length; i++) {
            float m = mean[first + i], s = square[first + i];
            magnitude[i] = magnitude_of(bits_of(advance(gradient[first + i], &m, &s, &n)));
            mean[first + i] = m;
            square[first + i] = s;
        }
        if (look) look_at(magnitude, length, first, &own);
    }
    if (look) *look = own;
}

/* Counts the magnitudes of an update whose moments are already advanced. */
void ties_look(const Range *range, Look *look) {
    const Numbers n = *range->numbers;
    Look own = *look;
    for (int64_t first = 0; first < range->size; first += BLOCK) {
        const int64_t left = range->size - first;
        const int length = left < BLOCK ? (int)left : BLOCK;
        uint32_t magnitude[BLOCK];
        for (int i = 0; i < length; i++) {
            float update = update_of(range->mean[first + i], range->square[first + i], &n);
            magnitude[i] = magnitude_of(bits_of(update));
        }
        look_at(magnitude, length, first, &own);
    }
    *look = own;
}

/* The update from moments that are already advanced. */
void note_update(const Range *range, float *restrict update) {
    const Numbers n = *range->numbers;
    for (int64_t i = 0; i < range->size; i++)
        update[i] = update_of(range->mean[i], range->square[i], &n);
}

/* top_p(tau) of a range: a value for each element (num_kept = ALL), or only the `num_kept` nonzero
 * values and their ascending places. */
enum { ALL = -1 };
typedef struct {
    const void *values;
    int width; /* bytes of a value; NO_TAU where there is none */
    const int32_t *places; /* the place of the range's first element is `origin` */
    int64_t num_kept, origin;
} TopTau;

/* Writes the elements [first, first + length) of tau; `*next` is the position of the next value. */
static inline void fill_drift(const TopTau *tau, int64_t first, int length, int64_t *next,
                              float *drift) {
    if (tau->num_kept == ALL) {
        if (tau->width == BFLOAT16)
            for (int i = 0; i < length; i++) drift[i] = tau_at(tau->values, BFLOAT16, first + i);
        else
            for (int i = 0; i < length; i++) drift[i] = tau_at(tau->values, FLOAT32, first + i);
        return;
    }
    memset(drift, 0, (size_t)length * sizeof *drift);
    const int64_t begin = tau->origin + first;
    for (; *next < tau->num_kept && tau->places[*next] < begin + length; ++*next)
        drift[tau->places[*next] - begin] = tau_at(tau->values, tau->width, *next);
}

/* Which updates top-p keeps at the cut: those whose words are at most `last_word`. */
typedef struct {
    uint32_t key[2], last_word;
} Ties;

/* Sets the updates that equal the cut and have too large words to 0. */
static inline void drop_ties(float *update, int length, uint64_t index, float cut,
                             const Ties *ties) {
    int any = 0;
    for (int i = 0; i < length; i++) any |= fabsf(update[i]) == cut;
    if (!any) return;
    uint32_t words[BLOCK];
    for (int done = 0; done < length;)
        done += hash_words(index + (uint64_t)done, length - done, ties->key, words + done);
    for (int i = 0; i < length; i++)
        update[i] = fabsf(update[i]) == cut && words[i] > ties->last_word ? 0.0f : update[i];
}

LOOP ties_loop(const Range *range, const TopTau *tau, const Ties *ties, int64_t *counts,
               int tau_width, int counting) {
    const Numbers n = *range->numbers;
    float *restrict theta = range->theta;
    const float *restrict mean = range->mean, *restrict square = range->square;
    int64_t count[2] = {0, 0}, next = 0;
    for (int64_t first = 0; first < range->size; first += BLOCK) {
        const int64_t left = range->size - first;
        const int length = left < BLOCK ? (int)left : BLOCK;
        float drift[BLOCK], kept[BLOCK];
        if (tau_width != NO_TAU) fill_drift(tau, first, length, &next, drift);
        if (ties) {
            for (int i = 0; i < length; i++)
                kept[i] = update_of(mean[first + i], square[first + i], &n);
            drop_ties(kept, length, range->start + (uint64_t)first, n.cut, ties);
        }
        for (int i = 0; i < length; i++) {
            float update = ties ? kept[i] : update_of(mean[first + i], square[first + i], &n);
            float change = (fabsf(update) >= n.cut ? update : 0.0f) * n.update_weight;
            if (tau_width != NO_TAU) change = consensus(change, drift[i] * n.tau_weight);
            write(theta + first + i, change, &n, counting, count);
        }
    }
    memcpy(counts, count, sizeof count);
}

/* OnTIES' second pass: eq. 7 of top_p(update) and top_p(tau). `ties` NULL: all ties are kept. */
void ties_step(const Range *range, const TopTau *top, const Ties *ties, int counting,
               int64_t *counts) {
    const int tau_width = top->width == NO_TAU ? NO_TAU : FLOAT32; /* of `drift` */
    if (ties)
        CHOOSE(ties_loop, range, top, ties, counts);
    else
        CHOOSE(ties_loop, range, top, NULL, counts);
}

/* Whether all gradients are finite: the exponent of NaN and Inf is all ones. */
void all_finite(int64_t size, const uint32_t *gradient, uint8_t *finite) {
    uint32_t found = 0;
    for (int64_t i = 0; i < size; i++) found |= (gradient[i] & 0x7f800000u) == 0x7f800000u;
    *finite = !found;
}
