/* The counter hash of operators/counter_random.py: the word of the element with global index i is
 * mix(mix(low32(i) ^ key[0]) ^ key[1] ^ high32(i) * 0x9e3779b9). */

#ifndef COUNTER_HASH_H
#define COUNTER_HASH_H

#include <stdint.h>

/* mix() without its first and last shift by 16. */
static inline uint32_t mix_core(uint32_t x) {
    x *= 0x7feb352du;
    return (x ^ (x >> 15)) * 0x846ca68bu;
}

static inline uint32_t mix(uint32_t x) {
    x = mix_core(x ^ (x >> 16));
    return x ^ (x >> 16);
}

/* A key's second word, mixed with the upper half of an index. */
static inline uint32_t upper_key(uint64_t index, const uint32_t *key) {
    return key[1] ^ (uint32_t)(index >> 32) * 0x9e3779b9u;
}

static inline uint32_t hash_word(uint64_t index, const uint32_t *key) {
    return mix(mix((uint32_t)index ^ key[0]) ^ upper_key(index, key));
}

/* Writes the words of up to `size` neighbours and returns their number; it stops where the upper
 * half of the index changes. */
static inline int hash_words(uint64_t index, int size, const uint32_t *key, uint32_t *words) {
    const uint32_t low = (uint32_t)index, high = upper_key(index, key);
    const uint64_t left = ((uint64_t)1 << 32) - low;
    const int length = left < (uint64_t)size ? (int)left : size;
    for (int i = 0; i < length; i++) words[i] = mix(mix((low + (uint32_t)i) ^ key[0]) ^ high);
    return length;
}

/* A Bernoulli mask for indices that share their upper 48 bits. The last shift of the first mix and
 * the first shift of the second one cancel; only high ^ high >> 16 remains. The very first shift
 * depends only on the bits that the indices share, so prepared_mask() does it once. */
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
