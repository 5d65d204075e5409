// CPU kernels of csrc/filtered_lrelu.h, compiled once per SIMD level.
//
// A tile is some columns of a plane of NCHW, or of a block of 16 channels of NHWC. Its rows are
// consecutive numbers, `depth` to a pixel, and pass through one after the other: the image between
// the filters is never whole. A filter that is an outer product filters each row of input along x
// and these along y, and the other way around on the way down; any other sums over all of its taps.

#include <type_traits>

#include "../filtered_lrelu.h"
#include "fir.h"
#include "levels.h"
#include "walk.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int64_t kRow = 4096;                // numbers of a tile's row between the filters
constexpr int64_t kWalk = 32;                 // rows between the filters of a call of `walk`
constexpr int64_t kWorkPerThread = 1 << 16;   // multiplications

constexpr int64_t modulo(int64_t a, int64_t b) { return a - floor_divide(a, b) * b; }

// One strip of 16 numbers, and what becomes of it.
template <class V, Signs signs_>
struct Activation {
  static constexpr Signs signs = signs_;
  V slope, limit, lower;
  uint32_t unlimited;              // without a clamp NaN is not clamped either
  decltype(V() < V()) inclined;    // a factor of zero gives zero, also for an infinite u

  explicit Activation(const FilteredLrelu& p)
      : slope(p.slope), limit(p.clamp), lower(-p.clamp),
        unlimited(std::isinf(p.clamp) ? ~0u : 0u), inclined(V(0.0) < slope) {}

  // Lanes `lane`, lane + 1, ... of the strip.
  STYLEGAN_FAST_INLINE V operator()(V u, Word& word, int lane) const {
    if constexpr (signs == Signs::read) {
      const V negative = where(inclined, slope * u, V(0.0));
      const V v = where(lanes_of<V>(word, lane), negative, u);
      return where(lanes_of<V>(word >> 8, lane), V(0.0), v);
    } else {
      const auto negative = u <= V(0.0);
      const V v = where(negative, slope * u, u);
      if constexpr (signs == Signs::kept) {
        constexpr uint32_t all = (1u << V::lanes) - 1;
        const uint32_t clamped = ~(bits(abs(v) <= limit) | unlimited) & all;
        word |= word_of<V>(bits(negative), lane) | word_of<V>(clamped, lane) << 8;
      }
      return where(v > limit, limit, where(v < lower, lower, v));
    }
  }
};

// One problem, and how it is cut into tiles.
template <class T, Signs signs>
struct Problem {
  using V = typename Compute<T>::Vector;
  using A = typename V::Scalar;

  Problem(const FilteredLrelu& p, const T* in, const uint8_t* read, uint8_t* kept, T* out)
      : p(p), in(in), read(read), kept(kept), out(out), activation(p),
        fu(p.fu.taps, p.fu.taps_x, p.fu.taps_y, p.fu.separable, p.correlate, p.gain),
        fd(p.fd.taps, p.fd.taps_x, p.fd.taps_y, p.fd.separable, p.correlate, 1.0),
        y{p.in_height, (p.out_height - 1) * p.down + p.fd.taps_y, p.pad_y, p.up, 1, p.fu.taps_y},
        depth(p.channels_last ? kGroup : 1), blocks(ceil_divide(p.channels, depth)),
        units(ceil_divide(p.channels_last ? p.channels : p.sign_width, 8)) {
    // Tiles begin at whole units of signs.
    width = smaller(larger(kRow / depth / p.down / 8, 1) * 8, p.out_width);
    columns = ceil_divide(p.out_width, width);
    tiles = p.samples * blocks * columns;
    const int64_t seen = (width - 1) * p.down + p.fd.taps_x + 7;
    between = ceil_divide(seen, kGroup) * kGroup;
    groups = between / p.up + 2;
    pointwise = !p.fu.taps && !p.fd.taps && p.up == 1 && p.down == 1 && p.pad_x == 0 &&
                p.pad_y == 0 && p.in_width == p.out_width && p.in_height == p.out_height;
    walks = V::lanes > 1 && fu.separable && fd.separable &&
            p.fu.taps_x == p.fu.taps_y && p.fd.taps_x == p.fd.taps_y &&
            with_walk(p.up, p.fu.taps_x, p.down, p.fd.taps_x, [](auto) {});
  }

  int threads(int most) const {
    const auto work = [](const Filter<A>& filter, const FilteredLreluFilter& f) {
      return filter.separable ? static_cast<double>(f.taps_x) + f.taps_y
                              : static_cast<double>(f.taps_x) * f.taps_y;
    };
    const double pixels = static_cast<double>(p.samples * p.channels) * p.out_height * p.out_width;
    const double taps = work(fu, p.fu) * p.down * p.down / p.up + work(fd, p.fd);
    const double useful = pixels * (taps + 1) / kWorkPerThread;
    return useful < most ? static_cast<int>(larger(1, useful)) : static_cast<int>(larger(1, most));
  }

  const FilteredLrelu& p;
  const T* const in;
  const uint8_t* const read;
  uint8_t* const kept;
  T* const out;
  const Activation<V, signs> activation;
  const Filter<A> fu, fd;
  const Axis y;  // from the input to between the filters
  const int64_t depth, blocks;
  const int64_t units;                // of signs, in a row
  int64_t width, columns, tiles;      // pixels of output of a tile
  int64_t between;                    // columns of a tile between the filters, at most
  int64_t groups;                     // of `up` of them
  bool pointwise;                     // no filters, nothing padded or cropped
  bool walks;                         // through registers (walk.h)
};

// What one thread computes.
template <class T, Signs signs>
class Worker {
 public:
  using V = typename Compute<T>::Vector;
  using A = typename V::Scalar;

  explicit Worker(const Problem<T, signs>& problem)
      : problem_(problem), p_(problem.p), depth_(problem.depth),
        phase_taps_((p_.fu.taps_x - 1) / p_.up + 1),
        sources_((p_.fu.taps_y - 1) / p_.up + 1 + (problem.walks ? kWalk / p_.up : 0)),
        kept_rows_(problem.walks ? kPhaseTaps + kWalk / p_.down : p_.fd.taps_y),
        in_length_(padded((problem.groups + phase_taps_) * depth_)),
        length_(padded(problem.groups * p_.up * depth_ + kGroup * 4)),
        up_phase_(splits(p_.up) ? padded(problem.groups) : 0),
        down_phase_(splits(p_.down) ? padded(length_ / p_.down + 1) : 0),
        source_length_(problem.fu.separable ? length_ : in_length_),
        slot_length_(problem.fd.separable ? length_ : larger(length_, down_phase_ * p_.down)),
        numbers_(in_length_ + sources_ * source_length_ + kept_rows_ * slot_length_ +
                 2 * length_ + up_phase_ * p_.up + down_phase_ * p_.down + 2 * kGroup),
        pointers_(most_taps() + 2 * (sources_ + p_.fd.taps_y)), weights_(most_taps()) {
    A* at = numbers_.get() + to_alignment(numbers_.get());
    const auto take = [&](int64_t count) { return (at += count) - count; };
    loaded_ = take(in_length_);
    source_ = take(sources_ * source_length_);
    slots_ = take(kept_rows_ * slot_length_);
    between_ = take(length_);
    row_ = take(length_);
    up_phases_ = take(up_phase_ * p_.up);
    down_phases_ = take(down_phase_ * p_.down);
    bias_ = take(kGroup);
    taps_ = {pointers_.get(), weights_.get(), 0};
    rows_ = pointers_.get() + most_taps();
    row_weights_ = rows_ + sources_ + p_.fd.taps_y;
  }

  // Output rows [begin, end) of all tiles, counted through.
  void run(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first = begin % p_.out_height;
      const int64_t last = smaller(p_.out_height, first + end - begin);
      start_tile(begin / p_.out_height);
      run_rows(first, last);
      begin += last - first;
    }
  }

 private:
  bool splits(int factor) const { return depth_ == 1 && factor > 1; }
  int64_t most_taps() const {
    return larger(sources_ * phase_taps_, static_cast<int64_t>(p_.fd.taps_y) * p_.fd.taps_x);
  }

  void start_tile(int64_t tile) {
    const int64_t column = tile % problem_.columns;
    const int64_t block = tile / problem_.columns % problem_.blocks;
    sample_ = tile / problem_.columns / problem_.blocks;
    channel_ = block * depth_;
    channels_ = smaller(depth_, p_.channels - channel_);
    out_begin_ = column * problem_.width;
    width_ = smaller(problem_.width, p_.out_width - out_begin_);

    // Columns between the filters: from a whole unit of signs on, in strips of 16 numbers.
    const int64_t seen_begin = out_begin_ * p_.down;
    const int64_t seen_end = (out_begin_ + width_ - 1) * p_.down + p_.fd.taps_x;
    sign_x_ = signs == Signs::read ? p_.sign_x : 0;
    sign_y_ = signs == Signs::read ? p_.sign_y : 0;
    begin_ = seen_begin - (depth_ == 1 ? modulo(seen_begin + sign_x_, 8) : 0);
    strips_ = depth_ == 1 ? ceil_divide(seen_end - begin_, kGroup) : seen_end - begin_;
    const int64_t columns = strips_ * kGroup / depth_;
    // The signs that this tile reads, or owns.
    sign_begin_ = signs == Signs::kept ? seen_begin : 0;
    sign_end_ = signs == Signs::kept && column + 1 < problem_.columns
                    ? (out_begin_ + width_) * p_.down
                    : p_.sign_width;

    // They are made in groups of `up`, all of which see the same samples.
    const int64_t lead = modulo(begin_ - p_.pad_x - 1, p_.up);
    groups_ = ceil_divide(lead + columns, p_.up);
    in_begin_ = floor_divide(begin_ - lead - p_.pad_x - 1, p_.up) + 1;
    strip_ = lead * depth_;
    seen_ = strip_ + (seen_begin - begin_) * depth_;

    // Borders of zeros around what is loaded.
    if (problem_.fu.separable) {
      std::memset(loaded_, 0, in_length_ * sizeof(A));
    } else {
      std::memset(source_, 0, sources_ * source_length_ * sizeof(A));
    }
    std::memset(bias_, 0, kGroup * sizeof(A));
    if (p_.bias) {
      const T* bias = static_cast<const T*>(p_.bias);
      A padded_bias[kGroup];
      load_padded<T, V>(bias + channel_, channels_, padded_bias);
      for (int j = 0; j < kGroup; ++j) bias_[j] = padded_bias[depth_ == 1 ? 0 : j];
    }
  }

  void run_rows(int64_t first, int64_t last) {
    own_begin_ = first * p_.down;
    own_end_ = last < p_.out_height ? last * p_.down : p_.sign_height;
    if (problem_.pointwise && depth_ > 1) {
      for (int64_t o = first; o < last; ++o) activate_pixels(o);
      return;
    }
    if constexpr (V::lanes > 1) {
      if (problem_.walks) {
        with_walk(p_.up, p_.fu.taps_x, p_.down, p_.fd.taps_x, [&](auto factors) {
          using Factors = decltype(factors);
          static_assert(Factors::offsets == 2, "");
          modulo(p_.pad_y + 1, 2) == 0 ? walk_rows<Factors, 0>(first, last)
                                       : walk_rows<Factors, 1>(first, last);
        });
        return;
      }
    }
    int64_t next_in = problem_.y.first(first * p_.down), next = first * p_.down;
    for (int64_t o = first; o < last; ++o) {
      const int64_t end = o * p_.down + p_.fd.taps_y;
      for (next = larger(next, o * p_.down); next < end; ++next) {
        next_in = larger(next_in, problem_.y.first(next));
        for (; next_in <= problem_.y.last(next); ++next_in) ready(next_in);
        between_row(next, slot(next));
      }
      filter_down(o);
      write(o, row_);
    }
  }

  // Row o where there is no filter.
  void activate_pixels(int64_t o) const {
    const V gain(p_.gain);
    const T* from = problem_.in + out_offset(o);
    T* to = problem_.out + out_offset(o);
    for (int64_t x = 0; x < width_; ++x, from += p_.channels, to += p_.channels) {
      Word word = 0;
      if constexpr (signs == Signs::read) word = read_signs(o, x);
      for (int64_t c = 0; c < channels_; c += V::lanes) {
        const V u = gain * (load_some(from + c, channels_ - c) + V::load(bias_ + c));
        store_upto(to + c, channels_ - c, problem_.activation(u, word, static_cast<int>(c)));
      }
      if constexpr (signs == Signs::kept) keep_signs(o, x, word);
    }
  }

  // Of `count` numbers, or of a vector of them.
  static V load_some(const T* from, int64_t count) {
    if constexpr (V::lanes > 1) {
      if (count < V::lanes) return load_lanes(from, 0, static_cast<int>(count));
    }
    return load(from, V());
  }
  static void store_upto(T* to, int64_t count, V v) {
    count < V::lanes ? store_some(to, count, v) : store(to, v);
  }

  template <class Factors, int offset>
  void walk_rows(int64_t first, int64_t last) {
    constexpr int up = Factors::up, down = Factors::down;
    constexpr int64_t most = kWalk / Factors::step;
    // The first row between the filters whose samples are those of the `up` - 1 after it, too.
    int64_t Y = first * down - modulo(first * down - p_.pad_y - 1, up);
    while (modulo(Y, down) != offset) Y -= up;
    int64_t sample = floor_divide(Y - p_.pad_y - 1, up) + 1, loaded = sample;
    int64_t o = floor_divide(Y, down) - kPhaseTaps + 1;
    A* const sums = slots_;
    A* const filtered = slots_ + kPhaseTaps * slot_length_;
    std::memset(sums, 0, kPhaseTaps * slot_length_ * sizeof(A));
    while (o < last) {
      const int64_t steps = smaller(ceil_divide(last - o, Factors::outputs), most);
      const int64_t samples = kPhaseTaps - 1 + steps * Factors::samples;
      for (; loaded < sample + samples; ++loaded) expanded<up>(loaded);
      for (int64_t k = 0; k < samples; ++k) rows_[k] = source(sample + k);
      for (int64_t s = 0; s < strips_; ++s) {
        const int64_t at = strip_ + s * kGroup;
        uint8_t copies[4 * kWalk];
        const Units units = units_of(Y, steps * Factors::step, s, copies);
        walk<Factors, offset, V>(rows_, at, steps, problem_.fu.along_y(), problem_.fd.along_y(),
                                 problem_.activation, units.at, units.step, sums + at,
                                 slot_length_, filtered + at, slot_length_);
        if (signs == Signs::kept && units.at == copies) {
          for (int64_t r = 0; r < steps * Factors::step; ++r)
            keep_signs(Y + r, s, load_word(copies + 4 * r));
        }
      }
      for (int64_t k = 0; k < steps * Factors::outputs; ++k, ++o)
        if (o >= first && o < last) contracted<down>(o, filtered + k * slot_length_);
      Y += steps * Factors::step;
      sample += steps * Factors::samples;
    }
  }

  template <int up>
  void expanded(int64_t i) const {
    A* to = source(i);
    if (!inside(i)) {
      std::memset(to, 0, length_ * sizeof(A));
      return;
    }
    load_row(i, loaded_);
    const A* taps = problem_.fu.along_x();
    depth_ == 1 ? expand_plane<up, V>(loaded_, taps, groups_, to)
                : expand_pixels<up, V>(loaded_, taps, groups_, to);
  }

  template <int down>
  void contracted(int64_t o, const A* row) {
    const A* taps = problem_.fd.along_x();
    T* to = problem_.out + out_offset(o);
    if (depth_ > 1) {
      contract_pixels<down, V>(row + seen_, taps, width_, channels_, to, p_.channels);
    } else if constexpr (V::lanes >= kPhaseTaps) {  // a phase is shifted within two vectors
      contract_plane<down, V>(row + seen_, taps, width_, to);
    } else {
      filter_down_along_x(row);
      write(o, row_);
    }
  }

  A* source(int64_t i) const { return source_ + modulo(i, sources_) * source_length_; }
  A* slot(int64_t i) const { return slots_ + i % kept_rows_ * slot_length_; }
  bool inside(int64_t i) const { return i >= 0 && i < p_.in_height; }

  // Brings row i of the input to where the sum along y, or over all taps, reads it.
  void ready(int64_t i) {
    if (!inside(i)) return;
    if (!problem_.fu.separable) return load_row(i, source(i));
    load_row(i, loaded_);
    rows_[0] = loaded_;
    row_weights_[0] = problem_.fu.along_x();
    expand(1, source(i));
  }

  void load_row(int64_t i, A* to) const {
    const int64_t begin = clip(in_begin_, 0, p_.in_width);
    const int64_t end = clip(in_begin_ + groups_ + phase_taps_ - 1, begin, p_.in_width);
    to += (begin - in_begin_) * depth_;
    if (depth_ == 1) {
      const T* from =
          problem_.in + ((sample_ * p_.channels + channel_) * p_.in_height + i) * p_.in_width;
      load_run(from + begin, end - begin, to);
    } else {
      const T* from = problem_.in + (sample_ * p_.in_height + i) * p_.in_width * p_.channels;
      const int64_t row = p_.in_width * p_.channels;
      from += begin * p_.channels + channel_;
      for (int64_t x = begin; x < end; ++x, from += p_.channels, to += depth_) {
        __builtin_prefetch(from + row, 0, 2);  // no processor sees such a stream coming
        load_run(from, channels_, to);
      }
    }
  }

  void load_run(const T* from, int64_t count, A* to) const {
    int64_t j = 0;
    for (; j <= count - V::lanes; j += V::lanes)
      (load(from + j, V()) + V::load(bias_ + j % kGroup)).store(to + j);
    if (j == count) return;
    const V rest = load_some(from + j, count - j) + V::load(bias_ + j % kGroup);
    store_some(to + j, count - j, rest);
  }

  // A row of groups of columns, of what rows_[k] hold through the taps row_weights_[k].
  void expand(int64_t count, A* to) {
    for (int i = 0; i < p_.up; ++i) {
      taps_.count = 0;
      for (int64_t r = 0; r < count; ++r)
        for (int64_t k = 0, tap = p_.up - 1 - i; tap < p_.fu.taps_x; ++k, tap += p_.up)
          taps_.add(rows_[r] + k * depth_, row_weights_[r][tap]);
      if (splits(p_.up)) {
        fir<V>(taps_, Runs(0, 1, groups_, 0, 0), up_phases_ + i * up_phase_);
      } else {
        fir<V>(taps_, Runs(0, groups_, depth_, depth_, p_.up * depth_), to + i * depth_);
      }
    }
    if (splits(p_.up)) unsplit(up_phases_, groups_ * p_.up, 1, p_.up, up_phase_, to);
  }

  // Row Y between the filters, from the rows of input that it sees.
  void between_row(int64_t Y, A* to) {
    const Axis& y = problem_.y;
    const bool split = !problem_.fd.separable && splits(p_.down);
    A* row = split ? between_ : to;
    const int64_t begin = clip(y.first(Y), 0, y.in), end = clip(y.last(Y) + 1, begin, y.in);
    if (problem_.fu.separable) {
      taps_.count = 0;
      for (int64_t i = begin; i < end; ++i)
        taps_.add(source(i) + strip_, problem_.fu.along_y()[y.tap(Y, i)]);
      fir<V>(taps_, Runs(0, 1, strips_ * kGroup, 0, 0), row + strip_);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        rows_[i - begin] = source(i);
        row_weights_[i - begin] = problem_.fu.full() + y.tap(Y, i) * p_.fu.taps_x;
      }
      expand(end - begin, row);
    }
    activate(Y, row + strip_);
    if (split) split_columns(row, to);
  }

  void activate(int64_t Y, A* row) const {
    const auto activation = problem_.activation;
    for (int64_t s = 0; s < strips_; ++s) {
      Word word = 0;
      if constexpr (signs == Signs::read) word = read_signs(Y, s);
      for (int lane = 0; lane < kGroup; lane += V::lanes) {
        A* at = row + s * kGroup + lane;
        activation(V::load(at), word, lane).store(at);
      }
      if constexpr (signs == Signs::kept) keep_signs(Y, s, word);
    }
  }

  // Where the signs of a strip are in their row, and which of them.
  struct Strip {
    int64_t at;
    int low, high;

    bool whole() const { return low == 0 && high == kGroup; }
  };
  Strip strip(int64_t s) const {
    if (depth_ == 1) {
      const int64_t column = begin_ + s * kGroup + sign_x_;
      return {column / 8 * 2, static_cast<int>(clip(sign_begin_ - column, 0, kGroup)),
              static_cast<int>(clip(sign_end_ - column, 0, kGroup))};
    }
    const int64_t column = begin_ + s + sign_x_;
    const bool inside = column >= sign_begin_ && column < sign_end_;
    return {(column * problem_.units + channel_ / 8) * 2, 0,
            inside ? static_cast<int>(channels_) : 0};
  }
  int64_t sign_row(int64_t row) const {
    const int64_t plane = p_.channels_last ? sample_ : sample_ * p_.channels + channel_;
    return (plane * p_.sign_height + row) * problem_.units * 2 *
           (p_.channels_last ? p_.sign_width : 1);
  }

  // Those of rows [Y, Y + count), where they are if all of them are there, else in `copies`.
  struct Units {
    uint8_t* at;
    int64_t step;
  };
  Units units_of(int64_t Y, int64_t count, int64_t s, uint8_t* copies) const {
    if (signs == Signs::none) return {nullptr, 0};
    const Strip strip = this->strip(s);
    const int64_t row = Y + sign_y_;
    const bool kept = signs == Signs::kept;
    const int64_t begin = kept ? own_begin_ : 0, end = kept ? own_end_ : p_.sign_height;
    if (strip.whole() && row >= begin && row + count <= end) {
      // Only Signs::kept writes.
      uint8_t* all = kept ? problem_.kept : const_cast<uint8_t*>(problem_.read);
      return {all + sign_row(row) + strip.at, sign_row(1) - sign_row(0)};
    }
    for (int64_t r = 0; !kept && r < count; ++r) store_word(copies + 4 * r, read_signs(Y + r, s));
    return {copies, 4};
  }

  Word read_signs(int64_t Y, int64_t s) const {
    const int64_t row = Y + sign_y_;
    if (row < 0 || row >= p_.sign_height) return ~Word(0);
    const Strip strip = this->strip(s);
    const uint8_t* from = problem_.read + sign_row(row) + strip.at;
    if (strip.whole()) return load_word(from);
    uint8_t units[4] = {};
    copy_units(strip, from, units);
    const uint32_t valid = (1u << strip.high) - (1u << strip.low);
    return load_word(units) | spread(~valid & 0xffff) << 8;
  }

  void keep_signs(int64_t Y, int64_t s, Word word) const {
    if (Y < own_begin_ || Y >= own_end_) return;
    const Strip strip = this->strip(s);
    uint8_t* to = problem_.kept + sign_row(Y) + strip.at;
    if (strip.whole()) return store_word(to, word);
    uint8_t units[4];
    store_word(units, word);
    copy_units(strip, units, to);
  }

  static void copy_units(const Strip& strip, const uint8_t* from, uint8_t* to) {
    for (int unit = strip.low / 8; unit < (strip.high + 7) / 8; ++unit)
      std::memcpy(to + unit * 2, from + unit * 2, 2);
  }

  void split_columns(const A* row, A* to) const {
    split(row + seen_, (width_ - 1) * p_.down + p_.fd.taps_x, 1, p_.down, down_phase_, to);
  }

  // Row o of the output into row_.
  void filter_down(int64_t o) {
    const int64_t taps_y = p_.fd.taps_y, first = o * p_.down;
    if (!problem_.fd.separable) {
      for (int64_t k = 0; k < taps_y; ++k) {
        rows_[k] = slot(first + k);
        row_weights_[k] = problem_.fd.full() + k * p_.fd.taps_x;
      }
      return contract(taps_y);
    }
    taps_.count = 0;
    for (int64_t k = 0; k < taps_y; ++k)
      taps_.add(slot(first + k) + strip_, problem_.fd.along_y()[k]);
    fir<V>(taps_, Runs(0, 1, strips_ * kGroup, 0, 0), between_ + strip_);
    filter_down_along_x(between_);
  }

  void filter_down_along_x(const A* row) {
    if (splits(p_.down)) split_columns(row, down_phases_);
    rows_[0] = splits(p_.down) ? down_phases_ : row;
    row_weights_[0] = problem_.fd.along_x();
    contract(1);
  }

  // Every `down`th column, of what rows_[k] hold through the taps row_weights_[k].
  void contract(int64_t count) {
    taps_.count = 0;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < p_.fd.taps_x; ++k)
        taps_.add(rows_[r] + (splits(p_.down) ? k % p_.down * down_phase_ + k / p_.down
                                              : seen_ + k * depth_),
                  row_weights_[r][k]);
    const Runs runs = depth_ == 1 ? Runs(0, 1, width_, 0, 0)
                                  : Runs(0, width_, depth_, p_.down * depth_, depth_);
    fir<V>(taps_, runs, row_);
  }

  int64_t out_offset(int64_t o) const {
    if (depth_ > 1)
      return ((sample_ * p_.out_height + o) * p_.out_width + out_begin_) * p_.channels + channel_;
    const int64_t plane = sample_ * p_.channels + channel_;
    return (plane * p_.out_height + o) * p_.out_width + out_begin_;
  }

  void write(int64_t o, const A* row) const {
    T* to = problem_.out + out_offset(o);
    if (depth_ == 1) return write_run(row, width_, to);
    for (int64_t x = 0; x < width_; ++x)
      write_run(row + x * depth_, channels_, to + x * p_.channels);
  }

  static void write_run(const A* row, int64_t count, T* to) {
    for (int64_t j = 0; j < count; j += V::lanes)
      store_upto(to + j, count - j, V::load(row + j));
  }

  const Problem<T, signs>& problem_;
  const FilteredLrelu& p_;
  const int64_t depth_, phase_taps_;
  const int64_t sources_, kept_rows_;
  const int64_t in_length_, length_, up_phase_, down_phase_, source_length_, slot_length_;
  const Buffer<A> numbers_;
  const Buffer<const A*> pointers_;
  const Buffer<A> weights_;
  Taps<A> taps_;
  const A **rows_, **row_weights_;
  A *loaded_, *source_, *slots_, *between_, *row_, *up_phases_, *down_phases_, *bias_;
  int64_t sample_, channel_, channels_, out_begin_, width_;
  int64_t begin_, strips_, groups_, in_begin_, strip_, seen_;
  int64_t sign_x_, sign_y_, sign_begin_, sign_end_, own_begin_, own_end_;
};

template <class T, Signs signs>
void run(const FilteredLrelu& p, const void* in, const uint8_t* read, uint8_t* kept, void* out,
         int threads) {
  const Problem<T, signs> problem(p, static_cast<const T*>(in), read, kept, static_cast<T*>(out));
  const int used = problem.threads(threads);
  const int64_t rows = problem.tiles * p.out_height;
  const Buffer<bool> lacks_memory(used);
#pragma omp parallel for num_threads(used) schedule(static, 1) if (used > 1)
  for (int thread = 0; thread < used; ++thread) {
    try {  // an exception may not leave a parallel region
      Worker<T, signs>(problem).run(rows * thread / used, rows * (thread + 1) / used);
    } catch (const std::bad_alloc&) {
      lacks_memory[thread] = true;
    }
  }
  for (int thread = 0; thread < used; ++thread)
    if (lacks_memory[thread]) throw std::bad_alloc();
}

}  // namespace

void filtered_lrelu_forward(const FilteredLrelu& p, const void* x, void* y, uint8_t* kept,
                            int threads) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    kept ? run<T, Signs::kept>(p, x, nullptr, kept, y, threads)
         : run<T, Signs::none>(p, x, nullptr, nullptr, y, threads);
  });
}

void filtered_lrelu_masked(const FilteredLrelu& p, const void* x, const uint8_t* read, void* y,
                           int threads) {
  with_dtype(p.dtype, [&](auto zero) {
    run<decltype(zero), Signs::read>(p, x, read, nullptr, y, threads);
  });
}

}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
