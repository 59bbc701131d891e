/* The fast path's passes on a CPU, for loops that the compiler turns into vector instructions.
 *
 * The arithmetic is that of operators/optim/adamw.py and merge.py. Every operation is correctly
 * rounded and none is contracted but where it says so, so that the bits of an element depend
 * neither on the machine's vectors nor on where a range is cut. Ranges are flat and hold `size`
 * elements; `numbers` are a step's, in the order of `Numbers`. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float take;          /* 1 - beta1 */
    float keep_square;   /* beta2 */
    float take_square;   /* 1 - beta2 */
    float eps;
    float scale;         /* minus the step size */
    float root;          /* root of the second moment's bias correction */
    float decay;
    float update_weight; /* 1 - a */
    float tau_weight;    /* a */
    float cut;           /* the smallest magnitude that top-p keeps */
} Numbers;

/* A mask's key, the upper half of the index folded in, and the largest word that is kept. */
typedef struct {
    uint32_t low, high, largest;
} Mask;

enum { NO_TAU = 0, BFLOAT16 = 2, FLOAT32 = 4 }; /* bytes of an element of tau */
enum { BLOCK = 1024, FEW = 64 }; /* elements that stay in the first cache; that are looked at once */

/* The two words that turn a mask's key into what `is_kept` needs for indices whose upper halves are
 * that of `index`. In the pinned function mix(mix(index ^ low) ^ high), a mix begins and ends with
 * x ^= x >> 16, which undoes itself: so the first one's end and the second one's beginning leave
 * only high ^ high >> 16. The very first one shifts down nothing but the indices' upper half. */
static inline Mask prepared(Mask mask, uint32_t index) {
    mask.low ^= (index ^ mask.low) >> 16;
    mask.high ^= mask.high >> 16;
    return mask;
}

static inline int is_kept(uint32_t index, Mask prepared_mask) {
    uint32_t x = (index ^ prepared_mask.low) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x = (x ^ prepared_mask.high) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return (x ^ (x >> 16)) <= prepared_mask.largest;
}

/* What AdamW adds, without decay. */
static inline float update_of(float mean, float square, const Numbers *n) {
    return mean * n->scale / (sqrtf(square) / n->root + n->eps);
}

/* Takes a gradient into both moments, fused where torch's lerp and addcmul are, so that these are
 * the reference path's bits (its square root is not); what AdamW then adds. */
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

/* Eq. 7: the sum where signs agree or one is zero, else the larger magnitude; 0 where equal. */
static inline float consensus(float change, float drift) {
    int against = ((change > 0.0f) & (drift < 0.0f)) | ((change < 0.0f) & (drift > 0.0f));
    float stronger = fabsf(drift) > fabsf(change) ? drift : change;
    stronger = fabsf(drift) == fabsf(change) ? 0.0f : stronger;
    return against ? stronger : change + drift;
}

/* theta * decay + change; counts[0] of what that does not move although it should, counts[1] of
 * all that it should move. */
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
void plain_step(int64_t size, float *restrict theta, const float *restrict gradient,
                float *restrict mean, float *restrict square, const Numbers *numbers) {
    const Numbers n = *numbers;
    for (int64_t i = 0; i < size; i++) {
        float m = mean[i], s = square[i];
        float change = advance(gradient[i], &m, &s, &n);
        mean[i] = m;
        square[i] = s;
        theta[i] = theta[i] * n.decay + change;
    }
}

/* Each loop is compiled once for every constant combination of what is decided once a call. */
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

LOOP dare_loop(int64_t size, float *restrict theta, const float *restrict gradient,
               float *restrict mean, float *restrict square, const void *restrict tau,
               uint32_t start, const Mask *masks, const Numbers *numbers, int64_t *counts,
               int tau_width, int counting) {
    const Numbers n = *numbers;
    int64_t count[2] = {0, 0};
    for (int64_t first = 0; first < size;) {
        const uint32_t index = start + (uint32_t)first;
        const int64_t same_upper_half = first + 0x10000 - (index & 0xffff);
        const int64_t end = same_upper_half < size ? same_upper_half : size;
        const Mask of_update = prepared(masks[0], index), of_tau = prepared(masks[1], index);
        for (int64_t i = first; i < end; i++) {
            const uint32_t here = start + (uint32_t)i;
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

/* OnDARE around AdamW, all in one pass; `start` is the lower half of the first global index. */
void dare_step(int64_t size, float *theta, const float *gradient, float *mean, float *square,
               const void *tau, int tau_width, uint32_t start, const Mask *masks,
               const Numbers *numbers, int counting, int64_t *counts) {
    CHOOSE(dare_loop, size, theta, gradient, mean, square, tau, start, masks, numbers, counts);
}

/* top_p(tau) of a range: a value for each element (num_kept ALL), or `num_kept` of them at ascending
 * places, the others 0. */
enum { ALL = -1 };
typedef struct {
    const void *values;
    int width; /* bytes of a value; NO_TAU where there is none */
    const int32_t *places;
    int64_t num_kept;
} TopTau;

/* Takes the elements [first, first + length) of tau out; `*next` is the first value of those to come. */
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
    for (; *next < tau->num_kept && tau->places[*next] < first + length; ++*next)
        drift[tau->places[*next] - first] = tau_at(tau->values, tau->width, *next);
}

LOOP ties_loop(int64_t size, float *restrict theta, const float *restrict mean,
               const float *restrict square, const TopTau *tau, const Numbers *numbers,
               int64_t *counts, int tau_width, int counting) {
    const Numbers n = *numbers;
    int64_t count[2] = {0, 0}, next = 0;
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int length = size - first < BLOCK ? (int)(size - first) : BLOCK;
        float drift[BLOCK];
        if (tau_width != NO_TAU) fill_drift(tau, first, length, &next, drift);
        for (int i = 0; i < length; i++) {
            float update = update_of(mean[first + i], square[first + i], &n);
            float change = (fabsf(update) >= n.cut ? update : 0.0f) * n.update_weight;
            if (tau_width != NO_TAU) change = consensus(change, drift[i] * n.tau_weight);
            write(theta + first + i, change, &n, counting, count);
        }
    }
    memcpy(counts, count, sizeof count);
}

/* OnTIES' second pass: eq. 7 of the updates at or above the cut, and top_p(tau). */
void ties_step(int64_t size, float *theta, const float *mean, const float *square,
               const void *tau, int width, const int32_t *places, int64_t num_kept,
               const Numbers *numbers, int counting, int64_t *counts) {
    const TopTau top = {tau, width, places, num_kept};
    const int tau_width = width == NO_TAU ? NO_TAU : FLOAT32; /* once it is taken out */
    CHOOSE(ties_loop, size, theta, mean, square, &top, numbers, counts);
}

/* Whether no gradient is NaN or Inf, whose exponents are all ones. */
void all_finite(int64_t size, const uint32_t *gradient, uint8_t *finite) {
    uint32_t found = 0;
    for (int64_t i = 0; i < size; i++) found |= (gradient[i] & 0x7f800000u) == 0x7f800000u;
    *finite = !found;
}

/* What a look for a cut found: counts[0] magnitudes above a bracket [low, high], counts[1] inside
 * it, which are written to `inside` until there are more than `room`: it is FEW longer. */
typedef struct {
    float low, high;
    float *inside;
    int64_t room;
    int64_t *counts;
} Look;

/* Adds a block's magnitudes to a look. FEW at a time are only counted, which vectors do; one by one
 * go those of the few places where some are inside, each written over by the next unless it is. */
static inline void look_at(const float *magnitude, int length, Look *look) {
    const float low = look->low, high = look->high;
    for (int first = 0; first < length; first += FEW) {
        const float *part = magnitude + first;
        const int count = length - first < FEW ? length - first : FEW;
        int at_least = 0, above = 0;
        for (int i = 0; i < count; i++) {
            at_least += part[i] >= low;
            above += part[i] > high;
        }
        look->counts[0] += above;
        if (at_least == above) continue;
        if (look->counts[1] <= look->room) {
            float *to = look->inside + look->counts[1];
            for (int i = 0; i < count; i++) {
                *to = part[i];
                to += (part[i] >= low) & (part[i] <= high);
            }
        }
        look->counts[1] += at_least - above;
    }
}

/* OnTIES' first pass: advances the moments and looks for the update's cut. */
void ties_advance(int64_t size, const float *restrict gradient, float *restrict mean,
                  float *restrict square, const Numbers *numbers, float low, float high,
                  float *inside, int64_t room, int64_t *counts) {
    const Numbers n = *numbers;
    Look look = {low, high, inside, room, counts};
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int length = size - first < BLOCK ? (int)(size - first) : BLOCK;
        float magnitude[BLOCK];
        for (int i = 0; i < length; i++) {
            float m = mean[first + i], s = square[first + i];
            magnitude[i] = fabsf(advance(gradient[first + i], &m, &s, &n));
            mean[first + i] = m;
            square[first + i] = s;
        }
        look_at(magnitude, length, &look);
    }
}

/* Looks for the cut of an update whose moments are advanced already. */
void ties_look(int64_t size, const float *restrict mean, const float *restrict square,
               const Numbers *numbers, float low, float high, float *inside, int64_t room,
               int64_t *counts) {
    const Numbers n = *numbers;
    Look look = {low, high, inside, room, counts};
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int length = size - first < BLOCK ? (int)(size - first) : BLOCK;
        float magnitude[BLOCK];
        for (int i = 0; i < length; i++)
            magnitude[i] = fabsf(update_of(mean[first + i], square[first + i], &n));
        look_at(magnitude, length, &look);
    }
}

/* Where an advanced update has a magnitude: the first `room` places, and in counts[0] how many. */
void equal_places(int64_t size, const float *restrict mean, const float *restrict square,
                  const Numbers *numbers, float magnitude, int64_t *places, int64_t room,
                  int64_t *counts) {
    const Numbers n = *numbers;
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int length = size - first < BLOCK ? (int)(size - first) : BLOCK;
        int equal = 0;
        for (int i = 0; i < length; i++)
            equal += fabsf(update_of(mean[first + i], square[first + i], &n)) == magnitude;
        for (int i = 0; equal > 0 && i < length; i++) {
            if (fabsf(update_of(mean[first + i], square[first + i], &n)) != magnitude) continue;
            if (counts[0] < room) places[counts[0]] = first + i;
            counts[0]++;
            equal--;
        }
    }
}

/* The update of moments that are advanced already. */
void note_update(int64_t size, const float *restrict mean, const float *restrict square,
                 float *restrict update, const Numbers *numbers) {
    const Numbers n = *numbers;
    for (int64_t i = 0; i < size; i++) update[i] = update_of(mean[i], square[i], &n);
}
