// Portable lanes: loops of fixed length that any compiler may vectorise for its baseline.
#pragma once

#include "cpu/bf16.h"

namespace mooring {
namespace MOORING_ISA {
namespace {

struct Vec {
    static constexpr int width = 8;
    float lane[width];

    static Vec broadcast(float x) {
        Vec v;
        for (float& l : v.lane) l = x;
        return v;
    }
    static Vec load(const float* p) {
        Vec v;
        std::memcpy(v.lane, p, sizeof v.lane);
        return v;
    }
    static Vec load(const Bf16* p) {
        Vec v;
        for (int i = 0; i < width; ++i) v.lane[i] = widen(p[i]);
        return v;
    }
    // The first `count` lanes from memory, the others `fill`.
    static Vec load(const float* p, int count, float fill) {
        Vec v = broadcast(fill);
        for (int i = 0; i < count; ++i) v.lane[i] = p[i];
        return v;
    }
    static Vec load(const Bf16* p, int count, float fill) {
        Vec v = broadcast(fill);
        for (int i = 0; i < count; ++i) v.lane[i] = widen(p[i]);
        return v;
    }
    void store(float* p) const { std::memcpy(p, lane, sizeof lane); }
    void store(Bf16* p) const { store(p, width); }
    void store(float* p, int count) const {
        for (int i = 0; i < count; ++i) p[i] = lane[i];
    }
    void store(Bf16* p, int count) const {
        for (int i = 0; i < count; ++i) p[i] = narrow(lane[i]);
    }
    void stream(float* p) const { store(p); }
    void stream(Bf16* p) const { store(p); }
    static void fence() {}
    float sum() const {
        return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    }
    float maximum() const {
        float best = lane[0];
        for (int i = 1; i < width; ++i) best = best > lane[i] ? best : lane[i];
        return best;
    }
};

template <typename F>
inline Vec lanewise(F f) {
    Vec out;
    for (int i = 0; i < Vec::width; ++i) out.lane[i] = f(i);
    return out;
}

inline Vec operator+(const Vec& a, const Vec& b) {
    return lanewise([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec operator-(const Vec& a, const Vec& b) {
    return lanewise([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec operator*(const Vec& a, const Vec& b) {
    return lanewise([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return lanewise([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Vec max(const Vec& a, const Vec& b) {
    return lanewise([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec min(const Vec& a, const Vec& b) {
    return lanewise([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// yes where a < b, no elsewhere
inline Vec select_less(const Vec& a, const Vec& b, const Vec& yes, const Vec& no) {
    return lanewise([&](int i) { return a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]; });
}
// p * 2^n where the low bits of `shifted` hold the integer n
inline Vec scale_by_power_of_two(const Vec& p, const Vec& shifted) {
    return lanewise([&](int i) { return float_of(bits_of(p.lane[i]) + (bits_of(shifted.lane[i]) << 23)); });
}

}  // namespace
}  // namespace MOORING_ISA
}  // namespace mooring
