/* Passes of the merge methods over a range, as loops that the compiler can vectorise. The results
 * have the same bits as operators/sparsify.py, consensus.py and selection.py: operations are fused
 * only where fmaf is written. `key` is the key of the counter hash, `start` the global index of the
 * range's first element. */

#include <math.h>

#include "rounding.h"
#include "selection.h"

/* A Bernoulli mask: 1 where the element's word is below the limit. */
void keep_mask(int64_t size, uint64_t start, const uint32_t *key, uint32_t limit, uint8_t *mask) {
    uint32_t words[BLOCK];
    for (int64_t done = 0; done < size;) {
        int length = hash_words(start + (uint64_t)done, size - done < BLOCK ? (int)(size - done) : BLOCK, key, words);
        for (int i = 0; i < length; i++) mask[done + i] = words[i] < limit;
        done += length;
    }
}

/* Widens bfloat16 numbers to floats. */
void widen(int64_t size, const uint16_t *restrict x, float *restrict wide) {
    for (int64_t i = 0; i < size; i++) wide[i] = widened(x[i]);
}

/* The deltas of bfloat16 models from their base, one model after the other. */
void widened_deltas(int64_t size, int num_models, const uint16_t *const *models,
                    const uint16_t *restrict base, float *restrict deltas) {
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int length = size - first < BLOCK ? (int)(size - first) : BLOCK;
        float origin[BLOCK];
        for (int i = 0; i < length; i++) origin[i] = widened(base[first + i]);
        for (int model = 0; model < num_models; model++) {
            const uint16_t *restrict own = models[model] + first;
            float *restrict delta = deltas + model * size + first;
            for (int i = 0; i < length; i++) delta[i] = widened(own[i]) - origin[i];
        }
    }
}

/* Whether all numbers are finite: the exponent of NaN and Inf is all ones. For 16 and 32 bits. */
void all_finite_16(int64_t size, const uint16_t *x, uint16_t ones, uint8_t *finite) {
    uint16_t found = 0;
    for (int64_t i = 0; i < size; i++) found |= (uint16_t)((x[i] & ones) == ones);
    *finite = !found;
}

void all_finite_32(int64_t size, const uint32_t *x, uint32_t ones, uint8_t *finite) {
    uint32_t found = 0;
    for (int64_t i = 0; i < size; i++) found |= (x[i] & ones) == ones;
    *finite = !found;
}

/* The sum of the weighted deltas, fused like torch's `add(alpha=...)`, divided by the divisor. */
void weighted_sum(int64_t size, int num_models, const float *const *deltas, const float *weights,
                  float divisor, float *restrict merged) {
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int length = size - first < BLOCK ? (int)(size - first) : BLOCK;
        float sum[BLOCK];
        for (int i = 0; i < length; i++) sum[i] = deltas[0][first + i] * weights[0];
        for (int model = 1; model < num_models; model++) {
            const float *delta = deltas[model] + first, weight = weights[model];
            for (int i = 0; i < length; i++) sum[i] = fmaf(delta[i], weight, sum[i]);
        }
        if (divisor == 1.0f)
            memcpy(merged + first, sum, (size_t)length * sizeof *sum);
        else
            for (int i = 0; i < length; i++) merged[first + i] = sum[i] / divisor;
    }
}

/* Rounds to bfloat16 (or else to float16). `finite` tells whether all results are finite; only then
 * are they right. With an origin, `sums` and `counts` become those of operators/rounding.py: element
 * i is added in lane i % LANES, and the lanes at the end, so that the vector width does not matter. */
void round_to_half(int64_t size, const float *x, int is_brain, const void *origin,
                   int origin_is_half, uint16_t *restrict written, uint8_t *finite,
                   double *restrict sums, int64_t *restrict counts) {
    Rounding found = {0};
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int length = size - first < BLOCK ? (int)(size - first) : BLOCK;
        float e[BLOCK], w[BLOCK];
/* The kinds are constants for the compiler. */
#define ROUND(is_brain, start, is_half)                                                            \
    round_part(length, x + first, is_brain, start, is_half, written + first, e, w, &found)
        if (!origin) {
            if (is_brain) ROUND(1, NULL, 0);
            else ROUND(0, NULL, 0);
            continue;
        }
        const void *start = (const char *)origin + (origin_is_half ? 2 : 4) * first;
        if (is_brain && origin_is_half) ROUND(1, start, 1);
        else if (is_brain) ROUND(1, start, 0);
        else if (origin_is_half) ROUND(0, start, 1);
        else ROUND(0, start, 0);
#undef ROUND
        for (int i = length; i % LANES; i++) e[i] = w[i] = 0.0f;
        add_products(length, e, w, &found);
    }
    *finite = found.largest < (is_brain ? 0x7f7f8000 : 0x477ff000); /* the first that becomes Inf */
    counts[0] = found.num_e;
    counts[1] = found.num_w;
    for (int lane = 0; lane < LANES; lane++) {
        sums[0] += found.ee[lane / WIDTH][lane % WIDTH];
        sums[1] += found.ww[lane / WIDTH][lane % WIDTH];
        sums[2] += found.ew[lane / WIDTH][lane % WIDTH];
    }
}

/* x where the mask is 1, else 0. */
void masked(int64_t size, const uint32_t *restrict x, const uint8_t *restrict mask,
            uint32_t *restrict kept) {
    for (int64_t i = 0; i < size; i++) kept[i] = x[i] & (0u - (uint32_t)mask[i]);
}

/* Runs `part(first, length)` over a range, FEW elements at a time. Except for the last part, the
 * length is a constant for the compiler. */
#define OVER_PARTS(part, ...)                                                                      \
    do {                                                                                           \
        int64_t first = 0;                                                                         \
        for (; first + FEW <= size; first += FEW) part(first, FEW, __VA_ARGS__);                   \
        if (first < size) part(first, (int)(size - first), __VA_ARGS__);                           \
    } while (0)

/* Words are computed only if a magnitude of the part equals that of a cut. */
PART void keep_part(int64_t first, int length, const uint32_t *restrict x, Cut outer, Cut inner,
                    uint64_t start, const uint32_t *key, uint32_t *restrict kept) {
    uint32_t tied = 0;
    for (int i = 0; i < length; i++) {
        uint32_t own = magnitude_of(x[first + i]);
        tied |= (own == outer.magnitude) | (own == inner.magnitude);
    }
    if (!tied) {
        for (int i = 0; i < length; i++) {
            uint32_t bits = x[first + i], own = magnitude_of(bits);
            int keeps = (own > outer.magnitude) & (own <= inner.magnitude);
            kept[first + i] = bits & (0u - (uint32_t)keeps);
        }
        return;
    }
    uint32_t words[FEW];
    for (int done = 0; done < length;)
        done += hash_words(start + (uint64_t)(first + done), length - done, key, words + done);
    for (int i = 0; i < length; i++) {
        uint32_t bits = x[first + i], own = magnitude_of(bits);
        int keeps = is_above(own, words[i], outer) & !is_above(own, words[i], inner);
        kept[first + i] = bits & (0u - (uint32_t)keeps);
    }
}

/* x where it is above the cut `outer` but not above the cut `inner`, else 0. */
void keep_between(int64_t size, const uint32_t *x, const Cut *cuts, uint64_t start,
                  const uint32_t *key, uint32_t *kept) {
    OVER_PARTS(keep_part, x, cuts[0], cuts[1], start, key, kept);
}

/* Looks at the magnitudes of a range. */
void look(int64_t size, const uint32_t *x, Look *look) {
    Look own = *look;
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int length = size - first < BLOCK ? (int)(size - first) : BLOCK;
        uint32_t magnitude[BLOCK];
        for (int i = 0; i < length; i++) magnitude[i] = magnitude_of(x[first + i]);
        look_at(magnitude, length, first, &own);
    }
    *look = own;
}

/* The buffers to sort a row; `sorted` and `other` hold magnitude << 32 | column. */
typedef struct {
    uint64_t *sorted, *other;
    uint32_t *place, *counts;
    struct { uint32_t limit; float chance; } *odds;
} Row;

/* Radix sort by the magnitude, for any distribution. */
static void sort_by_digits(Row *row, const uint32_t *x, int64_t width) {
    enum { DIGITS = 3, BITS = 11, VALUES = 1 << BITS };
    uint64_t *from = row->sorted, *to = row->other;
    for (int64_t i = 0; i < width; i++) from[i] = (uint64_t)magnitude_of(x[i]) << 32 | (uint64_t)i;
    for (int digit = 0; digit < DIGITS; digit++) {
        uint32_t counts[VALUES] = {0}, total = 0;
        const int shift = 32 + BITS * digit;
        for (int64_t i = 0; i < width; i++) counts[from[i] >> shift & (VALUES - 1)]++;
        for (int value = 0; value < VALUES; value++) {
            uint32_t count = counts[value];
            counts[value] = total;
            total += count;
        }
        for (int64_t i = 0; i < width; i++) to[counts[from[i] >> shift & (VALUES - 1)]++] = from[i];
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    row->sorted = from;
    row->other = to;
}

/* Sorts by the magnitude: first into equal intervals up to the largest magnitude, twice as many
 * intervals as elements (a normal distribution has one or two elements in each); then by insertion.
 * Returns 0 if the insertion moves elements more than 8 places on average: too many elements share
 * an interval. */
static int sort_by_intervals(Row *row, const uint32_t *x, int64_t width) {
    uint32_t top = 0, total = 0;
    for (int64_t i = 0; i < width; i++) top = magnitude_of(x[i]) > top ? magnitude_of(x[i]) : top;
    float largest;
    memcpy(&largest, &top, sizeof largest);
    const float scale = (float)(2 * width - 1) / largest;
    if (!isfinite(largest) || !isfinite(scale)) return 0;
    for (int64_t i = 0; i < width; i++) {
        uint32_t bits = magnitude_of(x[i]);
        float size;
        memcpy(&size, &bits, sizeof size);
        row->place[i] = (uint32_t)(int32_t)(size * scale);
    }
    memset(row->counts, 0, (size_t)(2 * width + 1) * sizeof *row->counts);
    for (int64_t i = 0; i < width; i++) row->counts[row->place[i]]++;
    for (int64_t interval = 0; interval <= 2 * width; interval++) {
        uint32_t count = row->counts[interval];
        row->counts[interval] = total;
        total += count;
    }
    uint64_t *sorted = row->sorted;
    int64_t moves_left = 8 * width;
    for (int64_t i = 0; i < width; i++)
        sorted[row->counts[row->place[i]]++] = (uint64_t)magnitude_of(x[i]) << 32 | (uint64_t)i;
    for (int64_t i = 1; i < width; i++) {
        uint64_t own = sorted[i];
        int64_t to = i;
        for (; to > 0 && sorted[to - 1] > own; to--) sorted[to] = sorted[to - 1];
        sorted[to] = own;
        moves_left -= i - to;
        if (moves_left < 0) return 0;
    }
    return 1;
}

/* Looks up every element's limit and chance by its doubled mid-rank. */
static void find_odds(Row *row, int64_t width, const uint32_t *limits, const float *chances) {
    const uint64_t *sorted = row->sorted;
    for (int64_t first = 0, last; first < width; first = last) {
        for (last = first + 1; last < width && sorted[last] >> 32 == sorted[first] >> 32;) last++;
        const int64_t rank = first + last - 1;
        for (int64_t i = first; i < last; i++) {
            row->odds[(uint32_t)sorted[i]].limit = limits[rank];
            row->odds[(uint32_t)sorted[i]].chance = chances[rank];
        }
    }
}

/* DELLA: an element is kept if its word is below the limit for its doubled mid-rank in the row, and
 * divided by the chance for that rank. `scratch` has room for 9 * width + 1 numbers of 32 bits. */
void magprune(int64_t num_rows, int64_t width, const uint32_t *x, uint64_t start,
              const uint32_t *key, const uint32_t *limits, const float *chances, void *scratch,
              float *kept) {
    uint64_t *pairs = scratch;
    Row row = {pairs, pairs + width, NULL, NULL, (void *)(pairs + 2 * width)};
    row.place = (uint32_t *)(pairs + 3 * width);
    row.counts = row.place + width;
    uint32_t words[BLOCK];
    for (int64_t number = 0; number < num_rows; number++, x += width, kept += width) {
        if (!sort_by_intervals(&row, x, width)) sort_by_digits(&row, x, width);
        find_odds(&row, width, limits, chances);
        for (int64_t done = 0; done < width;) {
            int length = width - done < BLOCK ? (int)(width - done) : BLOCK;
            length = hash_words(start, length, key, words);
            for (int i = 0; i < length; i++) {
                uint32_t bits = x[done + i] & (0u - (uint32_t)(words[i] < row.odds[done + i].limit));
                float value;
                memcpy(&value, &bits, sizeof value);
                kept[done + i] = value / row.odds[done + i].chance;
            }
            start += (uint64_t)length;
            done += length;
        }
    }
}

static inline float sign(float x) { return (float)((x > 0.0f) - (x < 0.0f)); }

/* TIES's election of signs. Sums are fused where torch's `add(alpha=...)` fuses them. */
void sign_elect(int64_t size, int num_models, const float *const *deltas, const float *weights,
                int normalize, float *restrict merged) {
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int length = size - first < BLOCK ? (int)(size - first) : BLOCK;
        float elected[BLOCK], sum[BLOCK], agreeing[BLOCK];
        for (int i = 0; i < length; i++) elected[i] = deltas[0][first + i] * weights[0];
        for (int model = 1; model < num_models; model++) {
            const float *delta = deltas[model] + first, weight = weights[model];
            for (int i = 0; i < length; i++) elected[i] = fmaf(delta[i], weight, elected[i]);
        }
        for (int i = 0; i < length; i++) {
            elected[i] = sign(elected[i]);
            sum[i] = agreeing[i] = 0.0f;
        }
        for (int model = 0; model < num_models; model++) {
            const float *delta = deltas[model] + first, weight = weights[model];
            for (int i = 0; i < length; i++) {
                float weighted = delta[i] * weight;
                float agrees = weighted * elected[i] > 0.0f ? 1.0f : 0.0f;
                sum[i] += weighted * agrees;
                agreeing[i] += fabsf(weight) * agrees;
            }
        }
        for (int i = 0; i < length; i++) {
            float divisor = agreeing[i] > 0x1p-126f ? agreeing[i] : 0x1p-126f;
            merged[first + i] = normalize ? sum[i] / divisor : sum[i];
        }
    }
}
