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

/* The FEW flags from `flags` on as the bits of a number, the first flag as the lowest bit. */
static inline uint64_t bits_of_flags(const uint8_t *flags) {
    uint64_t bits = 0;
    for (int first = 0; first < FEW; first += 8) {
        uint64_t eight; /* a product collects the flags of its eight bytes in its highest byte */
        memcpy(&eight, flags + first, 8);
        if (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) eight = __builtin_bswap64(eight);
        bits |= (eight * 0x0102040810204080u >> 56) << first;
    }
    return bits;
}

/* Writes the places of the flags that are 1, in order, and returns their number. `flags` are 0 from
 * `length` to the next multiple of FEW. */
static inline int list_flags(const uint8_t *flags, int length, int *places) {
    int num = 0;
    for (int first = 0; first < length; first += FEW) {
        uint64_t bits = bits_of_flags(flags + first);
        for (; bits; bits &= bits - 1) places[num++] = first + __builtin_ctzll(bits);
    }
    return num;
}

/* Counts keys of the bracket (minus `low`), and keeps the first `num_kept` of them. */
static inline void take_keys(Look *look, const uint64_t *keys, int num, int num_kept) {
    for (int i = 0; i < num; i++) look->buckets[keys[i] >> look->shift]++;
    memcpy(look->found + look->inside, keys, (size_t)num_kept * sizeof *keys);
    look->inside += num;
}

/* How many of `num` more keys there is room for. */
static inline int room_of(const Look *look, int num) {
    const int64_t room = look->room - look->inside;
    return room <= 0 ? 0 : room < num ? (int)room : num;
}

/* Looks at up to BLOCK magnitudes if the bracket holds whole magnitudes. */
static inline void look_by_magnitude(const uint32_t *magnitude, int length, uint64_t index,
                                     Look *look) {
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
    uint8_t flags[BLOCK] = {0};
    int places[BLOCK];
    uint64_t keys[BLOCK];
    for (int i = 0; i < length; i++) flags[i] = magnitude[i] - low <= high - low;
    const int num = list_flags(flags, length, places), num_kept = room_of(look, num);
    for (int i = 0; i < num; i++) keys[i] = (uint64_t)(magnitude[places[i]] - low) << 32;
    for (int i = 0; i < num_kept; i++) /* only kept keys need their words */
        keys[i] |= (uint32_t)~hash_word(index + (uint64_t)places[i], look->key);
    take_keys(look, keys, num, num_kept);
}

/* The same for up to FEW magnitudes if the bracket lies inside one magnitude. */
static inline void look_by_word(const uint32_t *magnitude, int length, uint64_t index, Look *look) {
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
    uint64_t keys[FEW];
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
    const int num = list_flags(flags, length, places);
    for (int i = 0; i < num; i++) keys[i] = ~words[places[i]] - low;
    take_keys(look, keys, num, room_of(look, num));
}

/* Looks at the magnitudes of up to BLOCK of a range's elements, from `first` on. */
static inline void look_at(const uint32_t *magnitude, int length, int64_t first, Look *look) {
    const uint64_t index = look->start + (uint64_t)first;
    if (!look->one_magnitude) {
        look_by_magnitude(magnitude, length, index, look);
        return;
    }
    for (int done = 0; done < length; done += FEW) {
        const int left = length - done;
        look_by_word(magnitude + done, left < FEW ? left : FEW, index + (uint64_t)done, look);
    }
}

/* The cut of top-p: above it are larger magnitudes, and equal ones whose word is at most `last`. */
typedef struct { uint32_t magnitude, last; } Cut;

static inline int is_above(uint32_t magnitude, uint32_t word, Cut cut) {
    return (magnitude > cut.magnitude) | ((magnitude == cut.magnitude) & (word <= cut.last));
}

#endif
