/* Passes of the merge methods over a range, for loops that the compiler turns into vector
 * instructions. The arithmetic is that of operators/sparsify.py, consensus.py, counter_random.py
 * and selection.py, to the last bit: no operation is contracted but where it says so. `key` is the
 * counter hash's, `start` the global index of a range's first element. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 1024, FEW = 32 }; /* elements that stay in the first cache; of which few match */

static inline uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* Words of up to BLOCK elements, or until the upper half of the index changes; how many. */
static inline int words_of(uint64_t index, int64_t size, const uint32_t *key, uint32_t *words) {
    const uint32_t low = (uint32_t)index, high = key[1] ^ (uint32_t)(index >> 32) * 0x9e3779b9u;
    const uint64_t left = ((uint64_t)1 << 32) - low;
    int length = size < BLOCK ? (int)size : BLOCK;
    if (left < (uint64_t)length) length = (int)left;
    for (int i = 0; i < length; i++) words[i] = mix(mix((low + (uint32_t)i) ^ key[0]) ^ high);
    return length;
}

static inline uint32_t magnitude(uint32_t bits) { return bits & 0x7fffffffu; }

/* A Bernoulli mask: which words are below the limit. */
void keep_mask(int64_t size, uint64_t start, const uint32_t *key, uint32_t limit, uint8_t *mask) {
    uint32_t words[BLOCK];
    for (int64_t done = 0; done < size;) {
        int length = words_of(start + (uint64_t)done, size - done, key, words);
        for (int i = 0; i < length; i++) mask[done + i] = words[i] < limit;
        done += length;
    }
}

/* x where the mask is 1, else 0. */
void masked(int64_t size, const uint32_t *restrict x, const uint8_t *restrict mask,
            uint32_t *restrict kept) {
    for (int64_t i = 0; i < size; i++) kept[i] = x[i] & (0u - (uint32_t)mask[i]);
}

/* Magnitudes above the cut, and of those equal to it the ones whose word is at most `last`. */
void top_mask(int64_t size, const uint32_t *x, uint32_t cut, uint32_t last, uint64_t start,
              const uint32_t *key, uint8_t *mask) {
    uint32_t words[BLOCK];
    for (int64_t done = 0; done < size;) {
        int length = words_of(start + (uint64_t)done, size - done, key, words);
        for (int i = 0; i < length; i++) {
            uint32_t own = magnitude(x[done + i]);
            mask[done + i] = (own > cut) | ((own == cut) & (words[i] <= last));
        }
        done += length;
    }
}

/* The same where all that are equal stay. */
void top_mask_all(int64_t size, const uint32_t *x, uint32_t cut, uint8_t *mask) {
    for (int64_t i = 0; i < size; i++) mask[i] = magnitude(x[i]) >= cut;
}

/* Adds the magnitudes in [low, high] to buckets of 2^shift, and to *num_above how many are above. */
void count_magnitudes(int64_t size, const uint32_t *x, uint32_t low, uint32_t high, int shift,
                      int64_t *buckets, int64_t *num_above) {
    for (int64_t first = 0; first < size; first += FEW) {
        const int length = size - first < FEW ? (int)(size - first) : FEW;
        uint32_t above = 0, inside = 0;
        for (int i = 0; i < length; i++) {
            uint32_t own = magnitude(x[first + i]);
            above += own > high;
            inside |= (own >= low) & (own <= high);
        }
        *num_above += above;
        if (!inside) continue;
        for (int i = 0; i < length; i++) {
            uint32_t own = magnitude(x[first + i]);
            if (own - low <= high - low) buckets[(own - low) >> shift]++;
        }
    }
}

/* Collects magnitude << 32 | the word turned round, of the magnitudes in [low, high]; counts[0] is
 * how many are above, counts[1] how many are in it. */
void collect_magnitudes(int64_t size, const uint32_t *x, uint32_t low, uint32_t high,
                        uint64_t start, const uint32_t *key, uint64_t *found, int64_t *counts) {
    int64_t num_above = 0, num_inside = 0;
    for (int64_t first = 0; first < size; first += FEW) {
        const int length = size - first < FEW ? (int)(size - first) : FEW;
        uint32_t above = 0, inside = 0;
        for (int i = 0; i < length; i++) {
            uint32_t own = magnitude(x[first + i]);
            above += own > high;
            inside |= (own >= low) & (own <= high);
        }
        num_above += above;
        if (!inside) continue;
        for (int i = 0; i < length; i++) {
            uint32_t own = magnitude(x[first + i]), word;
            if (own - low > high - low) continue;
            words_of(start + (uint64_t)(first + i), 1, key, &word);
            found[num_inside++] = (uint64_t)own << 32 | (uint32_t)~word;
        }
    }
    counts[0] = num_above;
    counts[1] = num_inside;
}

/* What a row is sorted with; `sorted` and `other` hold magnitude << 32 | column. */
typedef struct {
    uint64_t *sorted, *other;
    uint32_t *place, *counts;
    struct { uint32_t limit; float chance; } *odds;
} Row;

/* Sorts by the magnitude, digit by digit: for any distribution. */
static void sort_by_digits(Row *row, const uint32_t *x, int64_t width) {
    enum { DIGITS = 3, BITS = 11, VALUES = 1 << BITS };
    uint64_t *from = row->sorted, *to = row->other;
    for (int64_t i = 0; i < width; i++) from[i] = (uint64_t)magnitude(x[i]) << 32 | (uint64_t)i;
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

/* Sorts by the magnitude: first into even intervals up to the largest, twice as many as elements,
 * where a normal distribution has one or two in each; then each one past its larger neighbours.
 * Returns 0 where that moves more than a few places on average: too many share an interval. */
static int sort_by_intervals(Row *row, const uint32_t *x, int64_t width) {
    uint32_t top = 0, total = 0;
    for (int64_t i = 0; i < width; i++) top = magnitude(x[i]) > top ? magnitude(x[i]) : top;
    float largest;
    memcpy(&largest, &top, sizeof largest);
    const float scale = (float)(2 * width - 1) / largest;
    if (!isfinite(largest) || !isfinite(scale)) return 0;
    for (int64_t i = 0; i < width; i++) {
        uint32_t bits = magnitude(x[i]);
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
        sorted[row->counts[row->place[i]]++] = (uint64_t)magnitude(x[i]) << 32 | (uint64_t)i;
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

/* Every element's limit and chance, by its doubled mid-rank. */
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

/* DELLA: each element is kept if its word is below the limit of its doubled mid-rank in the row,
 * and divided by that rank's chance. `scratch` has room for 9 * width + 1 numbers of 32 bits. */
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
            int length = words_of(start, width - done, key, words);
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

/* The election of signs. Sums are fused where torch's `add(alpha=...)` is. */
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
