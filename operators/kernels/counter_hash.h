/* The counter hash of operators/counter_random.py: the word of the element with global index i is
 * mix(mix(low32(i) ^ key[0]) ^ key[1] ^ high32(i) * 0x9e3779b9). */

#ifndef COUNTER_HASH_H
#define COUNTER_HASH_H

#include <stdint.h>

/* mix() without the shifts by 16 at its two ends. */
static inline uint32_t mix_core(uint32_t x) {
    x *= 0x7feb352du;
    return (x ^ (x >> 15)) * 0x846ca68bu;
}

static inline uint32_t mix(uint32_t x) {
    x = mix_core(x ^ (x >> 16));
    return x ^ (x >> 16);
}

/* What the upper half of an index makes of a key's second word. */
static inline uint32_t upper_key(uint64_t index, const uint32_t *key) {
    return key[1] ^ (uint32_t)(index >> 32) * 0x9e3779b9u;
}

static inline uint32_t hash_word(uint64_t index, const uint32_t *key) {
    return mix(mix((uint32_t)index ^ key[0]) ^ upper_key(index, key));
}

/* Words of up to `size` neighbours, until the upper half of the index changes; how many. */
static inline int hash_words(uint64_t index, int size, const uint32_t *key, uint32_t *words) {
    const uint32_t low = (uint32_t)index, high = upper_key(index, key);
    const uint64_t left = ((uint64_t)1 << 32) - low;
    const int length = left < (uint64_t)size ? (int)left : size;
    for (int i = 0; i < length; i++) words[i] = mix(mix((low + (uint32_t)i) ^ key[0]) ^ high);
    return length;
}

/* A Bernoulli mask for indices that share their upper 48 bits. Between the two mixes, the shift
 * that ends one and the shift that begins the other cancel: only high ^ high >> 16 is left of them.
 * The very first shift moves nothing down but the upper half of the index. */
typedef struct {
    uint32_t low, high, largest;
} Mask;

static inline Mask prepared_mask(uint64_t index, const uint32_t *key, uint32_t largest) {
    Mask mask = {key[0], upper_key(index, key), largest};
    mask.low ^= ((uint32_t)index ^ mask.low) >> 16;
    mask.high ^= mask.high >> 16;
    return mask;
}

static inline int is_kept(uint32_t index, Mask mask) {
    uint32_t x = mix_core(mix_core(index ^ mask.low) ^ mask.high);
    return (x ^ (x >> 16)) <= mask.largest;
}

#endif
