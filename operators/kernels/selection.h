/* The look of operators/selection.py: how many keys are above a bracket, and which are inside it.
 *
 * An element's key is magnitude << 32 | ~word. The largest keys stay; so among equal magnitudes the
 * smallest words of the counter hash stay. */

#ifndef SELECTION_H
#define SELECTION_H

#include <string.h>

#include "counter_hash.h"

enum { BLOCK = 1024, FEW = 64 }; /* elements that fit the first cache; elements of one look */

typedef struct {
    uint64_t low, high; /* the bracket's first and last key */
    uint64_t start;     /* global index of a range's first element */
    uint32_t key[2];    /* of the counter hash */
    int32_t shift;      /* keys that differ only in these lower bits share a bucket */
    int32_t one_magnitude; /* the bracket lies inside one magnitude: words decide what is in it */
    int64_t *buckets;   /* how many keys are in each part of the bracket */
    uint64_t *found;    /* the first `room` keys in the bracket, minus `low` */
    int64_t room;
    int64_t above, inside; /* how many keys are above the bracket, and in it */
} Look;

static inline uint32_t magnitude_of(uint32_t bits) { return bits & 0x7fffffffu; }

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Writes the places of the flags that are 1, in order, and returns their number. */
static inline int list_flags(const uint8_t *flags, int *places) {
    int num = 0;
    for (int first = 0; first < FEW; first += 8) {
        uint64_t eight; /* eight flags at once, because most are 0 */
        memcpy(&eight, flags + first, 8);
        if (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) eight = __builtin_bswap64(eight);
        for (; eight; eight &= eight - 1) places[num++] = first + (__builtin_ctzll(eight) >> 3);
    }
    return num;
}

/* Counts a key of the bracket (minus `low`), and keeps it if there is room. `has_word`: the lower
 * half is set. */
static inline void take_key(Look *look, uint64_t key, int has_word) {
    look->buckets[key >> look->shift]++;
    if (has_word && look->inside < look->room) look->found[look->inside] = key;
    look->inside++;
}

/* Looks at up to FEW magnitudes if the bracket holds whole magnitudes. */
static inline __attribute__((always_inline)) void look_by_magnitude(
    const uint32_t *magnitude, int length, uint64_t index, Look *look) {
    const uint32_t low = (uint32_t)(look->low >> 32), high = (uint32_t)(look->high >> 32);
    int above = 0, at_least = 0;
    for (int i = 0; i < length; i++) {
        above += magnitude[i] > high;
        at_least += magnitude[i] >= low;
    }
    look->above += above;
    if (at_least == above) return;
    if (look->room == 0 && (look->high - look->low) >> look->shift == 0) { /* one bucket */
        look->inside += at_least - above;
        look->buckets[0] += at_least - above;
        return;
    }
    uint8_t flags[FEW] = {0};
    int places[FEW];
    for (int i = 0; i < length; i++) flags[i] = magnitude[i] - low <= high - low;
    const int num = list_flags(flags, places);
    for (int i = 0; i < num; i++) {
        const uint64_t key = (uint64_t)(magnitude[places[i]] - low) << 32;
        const int has_word = look->inside < look->room;
        const uint32_t word = has_word ? hash_word(index + (uint64_t)places[i], look->key) : 0;
        take_key(look, key | (uint32_t)~word, has_word);
    }
}

/* The same if the bracket lies inside one magnitude. */
static inline __attribute__((always_inline)) void look_by_word(
    const uint32_t *magnitude, int length, uint64_t index, Look *look) {
    const uint32_t own = (uint32_t)(look->low >> 32);
    const uint32_t low = (uint32_t)look->low, high = (uint32_t)look->high;
    int above = 0, equal = 0;
    for (int i = 0; i < length; i++) {
        above += magnitude[i] > own;
        equal += magnitude[i] == own;
    }
    look->above += above;
    if (equal == 0) return;
    uint32_t words[FEW];
    uint8_t flags[FEW] = {0};
    int places[FEW], more = 0;
    for (int done = 0; done < length;)
        done += hash_words(index + (uint64_t)done, length - done, look->key, words + done);
    for (int i = 0; i < length; i++) {
        const uint32_t turned = ~words[i];
        more += (magnitude[i] == own) & (turned > high);
        flags[i] = (magnitude[i] == own) & (turned >= low) & (turned <= high);
    }
    look->above += more;
    const int num = list_flags(flags, places);
    for (int i = 0; i < num; i++) take_key(look, (uint64_t)(~words[places[i]] - low), 1);
}

/* Looks at the magnitudes of a range's elements from `first` on. */
static inline void look_at(const uint32_t *magnitude, int length, int64_t first, Look *look) {
    for (int done = 0; done < length; done += FEW) {
        const int left = length - done;
        const uint64_t index = look->start + (uint64_t)(first + done);
        if (look->one_magnitude)
            look_by_word(magnitude + done, left < FEW ? left : FEW, index, look);
        else if (left >= FEW)
            look_by_magnitude(magnitude + done, FEW, index, look);
        else
            look_by_magnitude(magnitude + done, left, index, look);
    }
}

/* The cut of top-p: above it are larger magnitudes, and equal ones whose word is at most `last`. */
typedef struct { uint32_t magnitude, last; } Cut;

static inline int is_above(uint32_t magnitude, uint32_t word, Cut cut) {
    return (magnitude > cut.magnitude) | ((magnitude == cut.magnitude) & (word <= cut.last));
}

#endif
