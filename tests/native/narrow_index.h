// An int that holds 16 bits and says so when it does not: scripts/narrow_indices.py puts it where the kernels say int.
//
// It follows the rules of int with every width halved: with an int, or a smaller integer, it makes a Narrow again, and
// a result beyond 16 bits ends the program; with a 64-bit integer, an unsigned one (bits) or a floating point number it
// makes one of those. What int converts to without a cast, it does, but 64-bit integers and floating point numbers need
// one, and are checked. Its memory is that of an int32_t, so that tensors of these are read through it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <type_traits>

#pragma GCC system_header  // mixed signs and floats are compared as the kernels do, whose own build warns

namespace cascadeops {

[[noreturn]] inline void report_narrow(const char* what, double value) {
  std::fprintf(stderr, "narrow index: %s makes %.17g, which does not fit in 16 bits\n", what, value);
  volatile int overflow = std::numeric_limits<int>::max();
  ++overflow;  // UBSan reports it, with the stack
  std::abort();
}

class Narrow {
  template <typename T>
  static constexpr bool is_like_int = std::is_integral_v<T> && sizeof(T) <= 4 && !std::is_same_v<T, uint32_t>;
  template <typename T>
  static constexpr bool is_integer_of_32 = std::is_integral_v<T> && sizeof(T) <= 4;
  template <typename T>
  using if_wider = std::enable_if_t<std::is_arithmetic_v<T> && !is_integer_of_32<T>, int>;
  template <typename T>
  using if_number = std::enable_if_t<std::is_arithmetic_v<T>, int>;

  template <typename T>
  static constexpr Narrow checked(T value, const char* what) {
    constexpr T low = -32768, high = 32767;
    if (std::is_unsigned_v<T> ? value > high : !(value >= low && value <= high)) report_narrow(what, double(value));
    Narrow result{};
    result.value_ = static_cast<int32_t>(value);
    return result;
  }

 public:
  Narrow() = default;
  template <typename T, std::enable_if_t<is_integer_of_32<T>, int> = 0>
  constexpr Narrow(T value) : Narrow(checked(int64_t{value}, "a conversion")) {}
  template <typename T, if_wider<T> = 0>
  constexpr explicit Narrow(T value) : Narrow(checked(value, "a conversion")) {}

  constexpr operator int64_t() const { return value_; }

#define CASCADEOPS_NARROW_ARITHMETIC(op)                         \
  friend constexpr Narrow operator op(Narrow a, Narrow b) {      \
    return checked(int64_t{a.value_} op int64_t{b.value_}, #op); \
  }                                                              \
  template <typename T, if_number<T> = 0>                        \
  friend constexpr auto operator op(Narrow a, T b) {             \
    if constexpr (is_like_int<T>)                                \
      return checked(int64_t{a.value_} op int64_t{b}, #op);      \
    else                                                         \
      return a.value_ op b;                                      \
  }                                                              \
  template <typename T, if_number<T> = 0>                        \
  friend constexpr auto operator op(T a, Narrow b) {             \
    if constexpr (is_like_int<T>)                                \
      return checked(int64_t{a} op int64_t{b.value_}, #op);      \
    else                                                         \
      return a op b.value_;                                      \
  }                                                              \
  template <typename T>                                          \
  constexpr Narrow& operator op## = (T b) {                      \
    return *this = static_cast<Narrow>(*this op b);              \
  }
  CASCADEOPS_NARROW_ARITHMETIC(+)
  CASCADEOPS_NARROW_ARITHMETIC(-)
  CASCADEOPS_NARROW_ARITHMETIC(*)
  CASCADEOPS_NARROW_ARITHMETIC(/)
  CASCADEOPS_NARROW_ARITHMETIC(%)
  CASCADEOPS_NARROW_ARITHMETIC(&)
  CASCADEOPS_NARROW_ARITHMETIC(|)
  CASCADEOPS_NARROW_ARITHMETIC(^)
#undef CASCADEOPS_NARROW_ARITHMETIC

// The type of a shift is that of its left side.
#define CASCADEOPS_NARROW_SHIFT(op)                                                                               \
  friend constexpr Narrow operator op(Narrow a, Narrow b) { return checked(int64_t{a.value_} op b.value_, #op); } \
  template <typename T, if_number<T> = 0>                                                                         \
  friend constexpr Narrow operator op(Narrow a, T b) {                                                            \
    return checked(int64_t{a.value_} op b, #op);                                                                  \
  }                                                                                                               \
  template <typename T, if_number<T> = 0>                                                                         \
  friend constexpr auto operator op(T a, Narrow b) {                                                              \
    if constexpr (is_like_int<T>)                                                                                 \
      return checked(int64_t{a} op b.value_, #op);                                                                \
    else                                                                                                          \
      return a op b.value_;                                                                                       \
  }
  CASCADEOPS_NARROW_SHIFT(<<)
  CASCADEOPS_NARROW_SHIFT(>>)
#undef CASCADEOPS_NARROW_SHIFT

#define CASCADEOPS_NARROW_COMPARISON(op)                                                 \
  friend constexpr bool operator op(Narrow a, Narrow b) { return a.value_ op b.value_; } \
  template <typename T, if_number<T> = 0>                                                \
  friend constexpr bool operator op(Narrow a, T b) {                                     \
    return a.value_ op b;                                                                \
  }                                                                                      \
  template <typename T, if_number<T> = 0>                                                \
  friend constexpr bool operator op(T a, Narrow b) {                                     \
    return a op b.value_;                                                                \
  }
  CASCADEOPS_NARROW_COMPARISON(==)
  CASCADEOPS_NARROW_COMPARISON(!=)
  CASCADEOPS_NARROW_COMPARISON(<)
  CASCADEOPS_NARROW_COMPARISON(<=)
  CASCADEOPS_NARROW_COMPARISON(>)
  CASCADEOPS_NARROW_COMPARISON(>=)
#undef CASCADEOPS_NARROW_COMPARISON

  constexpr Narrow operator~() const { return checked(~int64_t{value_}, "~"); }
  constexpr Narrow operator-() const { return checked(-int64_t{value_}, "-"); }
  constexpr Narrow& operator++() { return *this = checked(int64_t{value_} + 1, "++"); }
  constexpr Narrow& operator--() { return *this = checked(int64_t{value_} - 1, "--"); }
  constexpr Narrow operator++(int) {
    const Narrow before = *this;
    ++*this;
    return before;
  }
  friend constexpr Narrow abs(Narrow a) { return a.value_ < 0 ? -a : a; }

  template <typename Stream>
  friend auto operator<<(Stream& stream, Narrow a) -> decltype(stream.flush() << 0) {
    return stream << a.value_;
  }

 private:
  int32_t value_;
};

}  // namespace cascadeops

template <>
struct std::numeric_limits<cascadeops::Narrow> {
  static constexpr bool is_specialized = true;
  static constexpr cascadeops::Narrow min() { return -32768; }
  static constexpr cascadeops::Narrow max() { return 32767; }
};
