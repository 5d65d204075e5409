// CPU kernels of csrc/upfirdn2d.h, compiled once per SIMD level.
//
// The image is cut into tiles of columns: of a plane where the output is NCHW, of a block of
// channels where it is NHWC. Either way a row is consecutive numbers, `depth` to a pixel, and every
// step is the same primitive, a weighted sum of shifted rows (`fir`). A filter that is an outer
// product filters the rows of the input that an output row sees along y, then that one row along x;
// any other filter sums over all its taps at once. The commonest filters go through registers and
// tall ones filter several rows at once (stream.h). The epilogue follows while the row is in L1.

#include <limits>
#include <type_traits>

#include "../upfirdn2d.h"
#include "epilogue_row.h"
#include "fir.h"
#include "levels.h"
#include "stream.h"

namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD {
namespace {

constexpr int64_t kTile = 1 << 15;            // numbers in a tile's row of input
constexpr int64_t kWindow = 1 << 18;          // numbers in the rows that an output row sees: L2
constexpr int64_t kStep = 2048;               // numbers filtered along y, then along x: L1
constexpr int64_t kMaxBatch = 32;             // rows of a step
constexpr int64_t kPastCache = 1 << 20;       // numbers of output that caches do not keep
constexpr int64_t kBuffered = 1 << 14;        // numbers of a block before the epilogue: L2
constexpr int64_t kBlock = 64;                // channels
constexpr int64_t kWorkPerThread = 1 << 16;   // multiplications
constexpr int kDirectTaps = 8;
constexpr int64_t kTallStep = 512;            // the same of a tall filter

// to[2 * j] and to[2 * j + 1] are the sums over the even and the odd taps; `count` numbers in all.
template <int kTaps, class V, class D>
void fir_interleaved(const Taps<typename V::Scalar>& even, const Taps<typename V::Scalar>& odd,
                     int64_t start, int64_t count, bool past_cache, D* to) {
  const Sum<kTaps, V> sum_even(even), sum_odd(odd);
  past_cache = past_cache && aligned(to, 0);
  V low, high;
  int64_t i = 0;
  for (; i <= count - 2 * V::lanes; i += 2 * V::lanes) {
    interleave(sum_even(start + i / 2), sum_odd(start + i / 2), low, high);
    store(to + i, low, past_cache);
    store(to + i + V::lanes, high, past_cache);
  }
  if (i == count) return;
  interleave(sum_even(start + i / 2), sum_odd(start + i / 2), low, high);
  store_some(to + i, smaller(V::lanes, count - i), low);
  if (count - i > V::lanes) store_some(to + i + V::lanes, count - i - V::lanes, high);
}

// The same where a pixel is `depth` numbers: pixels of even and of odd sums in turn.
template <int kTaps, class V, class D>
void fir_alternating(const Taps<typename V::Scalar>& even, const Taps<typename V::Scalar>& odd,
                     int64_t start, int64_t pixels, int64_t depth, int64_t from_step,
                     int64_t to_step, bool past_cache, D* to) {
  const Sum<kTaps, V> sum_even(even), sum_odd(odd);
  past_cache = past_cache && aligned(to, to_step | depth);
  const auto pixel = [=](int64_t at, D* out, bool both) {
    const auto vector = [=](int64_t j) {
      store(out + j, sum_even(at + j), past_cache);
      if (both) store(out + to_step + j, sum_odd(at + j), past_cache);
    };
    int64_t j = 0;
    for (; j <= depth - V::lanes; j += V::lanes) vector(j);
    if (j < depth) vector(depth - V::lanes);
  };
  for (; pixels >= 2; pixels -= 2, start += from_step, to += 2 * to_step) pixel(start, to, true);
  if (pixels) pixel(start, to, false);
}

// How input becomes numbers of the accumulation type: as it is, or as d(v).
struct Plain {
  template <class T>
  auto operator()(const T* in, const uint8_t*, int64_t k, int lane) const {
    return load(in + k * kGroup + lane, typename Compute<T>::Vector());
  }
};

// One problem, and how it is cut into tiles.
template <class T, class Source>
struct Problem {
  using V = typename Compute<T>::Vector;
  using A = typename V::Scalar;

  Problem(const Upfirdn2d& p, const Source& source, const T* in, const uint8_t* in_mask,
          const Epilogue* epilogue, const T* add, T* out, uint8_t* out_mask, bool with_sums)
      : p(p), source(source), in(in), in_mask(in_mask), add(add), out(out),
        tail(epilogue, out_mask), with_sums(with_sums),
        filter(p.taps, p.taps_x, p.taps_y, p.separable, p.correlate, p.gain),
        x{p.in_width, p.out_width, p.pad_x, p.up_x, p.down_x, p.taps_x},
        y{p.in_height, p.out_height, p.pad_y, p.up_y, p.down_y, p.taps_y} {
    // An image of one pixel is both: as NHWC its mask units are whole.
    channels_last = p.channels_last || p.out_height * p.out_width == 1;
    const int64_t window = smaller((p.taps_y - 1) / p.up_y + 1, p.in_height);
    const bool long_window = window > 2 * kGroup;
    const int64_t block = long_window ? kGroup : kBlock;  // wide tiles share the columns both see
    depth = !channels_last ? 1 : static_cast<int>(p.channels <= 2 * block ? p.channels : block);
    blocks = ceil_divide(p.channels, depth);
    const int64_t common = greatest_common_divisor(p.up_x, p.down_x);
    out_phases = static_cast<int>(p.up_x / common);
    in_phases = static_cast<int>(p.down_x / common);
    narrow = depth < V::lanes;
    // The last block of channels, too, is a vector at least.
    const bool fits = depth == 1 || (depth >= V::lanes && p.channels % depth % V::lanes == 0);
    streams = std::is_same<A, float>::value && filter.separable && fits &&
              p.taps_x == p.taps_y && p.up_x * p.up_y == 1 && p.down_x == p.down_y &&
              with_stream_filter(p.taps_x, p.down_x, [&](auto f) {
                batch = depth == 1 ? kMaxBatch : decltype(f)::rows;
              });
    const int64_t most = larger(smaller(kTile, kWindow / window) / depth, kGroup);
    const int64_t unit = narrow ? kGroup * out_phases : out_phases;
    const auto out_pixels = [&](int64_t in_pixels) {
      return ceil_divide(larger(in_pixels * p.up_x / p.down_x, 1), unit) * unit;
    };
    width = smaller(out_pixels(most), p.out_width);
    // A step: along y, more vectors than a store buffer holds before any of them is read again
    // along x; of a tall filter rows that share what they read.
    tall = long_window && filter.separable && p.up_y == 1 && p.down_y == 1;
    batch = !filter.separable ? 1
            : streams         ? batch
            : long_window     ? kGroup
                              : clip(kStep / (width * depth), 1, kMaxBatch);
    batch = smaller(batch, p.out_height);
    const int64_t numbers = tall          ? kTallStep
                            : long_window ? 2 * kStep / (window + batch)
                                          : kStep / batch;
    converts = streams && std::is_same<Source, Plain>::value && !tail.e && !add &&
               (depth == 1 ? p.stride_w : p.stride_c) == 1;
    buffers = tail.e || add || (!std::is_same<T, A>::value && !converts);
    step = !filter.separable || (streams && !buffers) ? width
           : streams ? larger(kBuffered / (batch * depth), 1)
                     : out_pixels(larger(numbers / depth, 1));
    step = smaller(step, width);
    rows = smaller((p.taps_y - 1 + (batch - 1) * p.down_y) / p.up_y + 1, p.in_height);
    columns = ceil_divide(p.out_width, width);
    tiles = p.samples * blocks * columns;
    // Columns of input: what the outputs see; in whole mask units, and with what the tile owns.
    seen = (width * p.down_x + p.taps_x) / p.up_x + 2 + in_phases;
    past_cache = p.samples * p.channels * p.out_height * p.out_width >= kPastCache;
    input = with_sums ? p.in_width : smaller(seen + kGroup, p.in_width);
  }

  int threads(int most) const {
    const double taps = filter.separable
                            ? static_cast<double>(p.taps_x) / p.up_x +
                                  static_cast<double>(p.taps_y) / p.up_y
                            : static_cast<double>(p.taps_x) * p.taps_y / p.up_x / p.up_y;
    const double pixels = static_cast<double>(p.out_height) * p.out_width * (taps + 1) +
                          static_cast<double>(p.in_height) * p.in_width;
    const double useful = pixels * p.samples * p.channels / kWorkPerThread;
    return useful < most ? static_cast<int>(larger(1, useful)) : static_cast<int>(larger(1, most));
  }

  const Upfirdn2d& p;
  const Source source;
  const T* const in;
  const uint8_t* const in_mask;
  const T* const add;
  T* const out;
  const Tail<V> tail;
  const bool with_sums;
  const Filter<A> filter;
  const Axis x, y;
  int depth, out_phases, in_phases;
  bool channels_last;
  bool narrow;   // a pixel is less than a vector, so phases are stored apart
  bool streams;  // through registers (stream.h)
  bool tall;     // rows of output along y together (stream.h)
  bool converts;  // streams read the input and write the output, whatever their type
  bool past_cache;  // the output is too large to be found in a cache later
  bool buffers;   // the filter's result is not yet the output
  int64_t blocks, width, columns, tiles, rows, input, seen;
  int64_t batch, step;  // rows, and pixels of the output
};

// What one thread computes.
template <class T, class Source>
class Worker {
 public:
  using V = typename Compute<T>::Vector;
  using A = typename V::Scalar;

  Worker(const Problem<T, Source>& problem, double* totals)
      : problem_(problem), p_(problem.p), x_(problem.x), y_(problem.y), depth_(problem.depth),
        totals_(totals), loaded_length_(padded(problem.input * depth_)),
        phase_length_(problem.narrow ? problem.seen / problem.in_phases * depth_ + depth_ : 0),
        prepared_length_(padded(larger(problem.seen * depth_ + kGroup,
                                       phase_length_ * problem.in_phases))),
        out_length_(padded(problem.step * depth_)),
        out_phase_length_(padded((problem.step / problem.out_phases + 1) * depth_)),
        numbers_(loaded_length_ * loaded_rows() + prepared_length_ * prepared_rows() +
                 prepared_length_ * problem.batch +
                 out_length_ * (problem.streams ? problem.batch : 1) + 3 * pattern_length() +
                 (splits_output() ? out_phase_length_ * problem.out_phases : 0) + padded(depth_) +
                 weights() + kGroup),
        pointers_(weights()), stream_rows_(rows_of_a_stream()),
        tall_rows_(problem.tall ? p_.taps_y + problem.batch : 0), taps_(problem.out_phases) {
    A* at = numbers_.get() + to_alignment(numbers_.get());
    const auto take = [&](int64_t count) { return (at += count) - count; };
    loaded_ = take(loaded_length_ * loaded_rows());
    prepared_ = take(prepared_length_ * prepared_rows());
    filtered_ = take(prepared_length_ * problem.batch);
    row_ = take(out_length_ * (problem.streams ? problem.batch : 1));
    scale_ = take(pattern_length());
    bias_ = take(pattern_length());
    noise_ = take(pattern_length());
    phases_ = splits_output() ? take(out_phase_length_ * problem.out_phases) : nullptr;
    part_ = take(padded(depth_));
    const A** from = pointers_.get();
    vertical_ = {from, take(problem.rows), 0};
    from += problem.rows;
    const int64_t most = taps_of_a_phase();
    for (int r = 0; r < problem.out_phases; ++r) {
      taps_[r] = {from, take(most), 0};
      from += most;
    }
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
    if (problem_.past_cache) store_fence();
  }

 private:
  bool splits_output() const { return problem_.narrow && problem_.out_phases > 1; }
  int64_t loaded_rows() const { return problem_.filter.separable ? problem_.rows : 1; }
  int64_t prepared_rows() const {
    return !problem_.filter.separable ? problem_.rows : splits_input() ? problem_.batch : 0;
  }
  int64_t pattern_length() const { return problem_.tail.e ? out_length_ : 0; }
  int64_t taps_of_a_phase() const {
    const int64_t taps = (p_.taps_x - 1) / p_.up_x + 1;
    return problem_.filter.separable ? taps : taps * problem_.rows;
  }
  int64_t rows_of_a_stream() const { return p_.taps_y + (problem_.batch + 1) * p_.down_y; }
  int64_t weights() const { return problem_.rows + problem_.out_phases * taps_of_a_phase(); }

  void start_tile(int64_t tile) {
    const int64_t column = tile % problem_.columns;
    const int64_t block = tile / problem_.columns % problem_.blocks;
    sample_ = tile / problem_.columns / problem_.blocks;
    channel_ = block * problem_.depth;
    depth_ = static_cast<int>(smaller(problem_.depth, p_.channels - channel_));
    out_x_ = column * problem_.width;
    width_ = smaller(problem_.width, p_.out_width - out_x_);
    const int64_t out_end = out_x_ + width_;

    // Columns of the input: seen, inside the image, owned, loaded.
    seen_begin_ = x_.first(out_x_);
    seen_end_ = larger(x_.last(out_end - 1) + 1, seen_begin_);
    begin_ = clip(seen_begin_, 0, x_.in);
    end_ = clip(seen_end_, 0, x_.in);
    own_begin_ = x_.in * column / problem_.columns;
    own_end_ = x_.in * (column + 1) / problem_.columns;
    load_begin_ = begin_;
    load_end_ = end_;
    if (problem_.with_sums) {
      load_begin_ = begin_ < end_ ? smaller(begin_, own_begin_) : own_begin_;
      load_end_ = begin_ < end_ ? larger(end_, own_end_) : own_end_;
    }
    if (problem_.in_mask) {
      load_begin_ = load_begin_ / 8 * 8;
      load_end_ = smaller(ceil_divide(load_end_, 8) * 8, x_.in);
    }
    const int64_t in_step = p_.stride_w;
    const bool unit = depth_ == 1 ? in_step == 1 || end_ - begin_ == 1 : p_.stride_c == 1;
    const int64_t run = depth_ == 1 || in_step == depth_ ? (end_ - begin_) * depth_ : depth_;
    // Many rows a power of two apart would share cache sets.
    streams_ = problem_.streams && begin_ < end_;
    direct_ = streams_ ? problem_.converts || (std::is_same<T, A>::value && unit)
                       : std::is_same<T, A>::value && unit && run >= V::lanes &&
                             p_.taps_y <= kDirectTaps * p_.up_y;
    direct_ = direct_ && std::is_same<Source, Plain>::value;

    start_tail();
    if (streams_) return;

    // Borders of zeros around what will be written, which is aligned.
    shift_ = ((seen_begin_ - begin_) * depth_ % kGroup + kGroup) % kGroup;
    std::memset(filtered_, 0, prepared_length_ * problem_.batch * sizeof(A));
    if (problem_.filter.separable) {
      for (int r = 0; r < problem_.out_phases; ++r) {
        taps_[r].count = 0;
        add_row_taps(r, prepared_row(0), problem_.filter.along_x());
      }
    }
  }

  // What the taps along x of the outputs of phase r read of a prepared row.
  void add_row_taps(int r, const A* row, const A* weights) {
    const int64_t o = out_x_ + r;
    if (r >= width_) return;
    for (int64_t i = x_.first(o); i <= x_.last(o); ++i) {
      const int64_t at = i - seen_begin_;
      const A* from = row + at * depth_;
      if (splits_input()) {
        from = row + at % problem_.in_phases * phase_length_ + at / problem_.in_phases * depth_;
      }
      taps_[r].add(from, weights[x_.tap(o, i)]);
    }
  }

  bool splits_input() const { return problem_.narrow && problem_.in_phases > 1; }
  A* prepared_row(int64_t k) const {
    return splits_input() ? prepared_ + k * prepared_length_ : filtered_row(k);
  }
  A* filtered_row(int64_t k) const { return filtered_ + k * prepared_length_ + shift_; }

  void run_rows(int64_t first, int64_t last) {
    int64_t own = y_.in * first / y_.out;
    const int64_t own_end = y_.in * last / y_.out;
    int64_t next = problem_.with_sums ? own : 0;
    const auto advance = [&](int64_t end) {
      for (; next < end; ++next) {
        ready(next);
        if (problem_.with_sums && own <= next && next < own_end) add_to_sums(next);
      }
    };
    bool started = false;
    for (int64_t o = first; o < last; o += problem_.batch) {
      const int64_t rows = smaller(problem_.batch, last - o);
      const int64_t begin = clip(y_.first(o), 0, y_.in);
      const int64_t end = clip(y_.last(o + rows - 1) + 1, begin, y_.in);
      if (!problem_.with_sums) {
        next = started ? larger(next, begin) : begin;
      } else if (!started && begin < end) {
        next = smaller(next, begin);
      }
      started = started || begin < end;
      advance(end);
      if (streams_) {
        if constexpr (std::is_same<A, float>::value) {
          problem_.converts ? stream<T>(o, rows) : stream<A>(o, rows);
        }
      } else if (problem_.filter.separable) {
        filter_separably(o, rows);
      } else {
        for (int r = 0; r < problem_.out_phases; ++r) {
          taps_[r].count = 0;
          for (int64_t i = begin; i < end; ++i)
            add_row_taps(r, prepared_ + i % problem_.rows * prepared_length_,
                         problem_.filter.full() + y_.tap(o, i) * x_.taps);
        }
        filter_along_x(o, 0, 0, width_);
      }
    }
    if (problem_.with_sums) advance(own_end);
  }

  // Brings row i of the input to where the filters read it.
  void ready(int64_t i) {
    if (problem_.filter.separable) {
      if (!direct_) load_row(i, loaded_row(i));
      return;
    }
    A* slot = prepared_ + i % problem_.rows * prepared_length_;
    load_row(i, loaded_);
    A* row = splits_input() ? filtered_row(0) : slot;
    if (row == slot) std::memset(slot, 0, prepared_length_ * sizeof(A));
    if (begin_ < end_) {
      std::memcpy(row + (begin_ - seen_begin_) * depth_,
                  loaded_ + (begin_ - load_begin_) * depth_, (end_ - begin_) * depth_ * sizeof(A));
    }
    if (row != slot) split_columns(row, 0, seen_end_ - seen_begin_, slot);
  }

  A* loaded_row(int64_t i) const {
    return loaded_ + (problem_.filter.separable ? i % problem_.rows * loaded_length_ : 0);
  }

  // Columns [first, last), first a multiple of the number of phases.
  void split_columns(const A* row, int64_t first, int64_t last, A* to) const {
    split(row + first * depth_, last - first, depth_, problem_.in_phases, phase_length_,
          to + floor_divide(first, problem_.in_phases) * depth_);
  }

  int64_t in_offset(int64_t row, int64_t column) const {
    return sample_ * p_.stride_n + channel_ * p_.stride_c + row * p_.stride_h +
           column * p_.stride_w;
  }

  void load_row(int64_t i, A* to) const {
    const int64_t pixels = load_end_ - load_begin_, start = in_offset(i, load_begin_);
    const int64_t step = p_.stride_w;
    const bool unit = depth_ == 1 ? step == 1 : p_.stride_c == 1;
    if (unit && (!problem_.in_mask || (start % 8 == 0 && (depth_ == 1 || step % 8 == 0)))) {
      const Runs runs = depth_ == 1 ? Runs(0, 1, pixels, 0, 0)
                                    : Runs(0, pixels, depth_, step, depth_);
      for (int64_t r = 0; r < runs.runs; ++r)
        load_run(start + r * runs.from_step, runs.count, to + r * runs.to_step);
    } else {
      gather_row(start, pixels * depth_, to);
    }
  }

  void load_run(int64_t start, int64_t count, A* to) const {
    const T* in = problem_.in + start;
    const uint8_t* units = problem_.in_mask ? problem_.in_mask + start / 8 * 2 : nullptr;
    const int64_t groups = count / kGroup, rest = count % kGroup;
    load_groups(in, units, groups, to);
    if (rest == 0) return;
    T padded[kGroup] = {};
    uint8_t padded_units[4] = {};
    std::memcpy(padded, in + groups * kGroup, rest * sizeof(T));
    if (units) std::memcpy(padded_units, units + groups * 4, (rest + 7) / 8 * 2);
    load_groups(padded, padded_units, 1, to + groups * kGroup);
  }

  void load_groups(const T* in, const uint8_t* units, int64_t groups, A* to) const {
    const Source source = problem_.source;
    for (int64_t k = 0; k < groups; ++k)
      for (int lane = 0; lane < kGroup; lane += V::lanes)
        source(in, units, k, lane).store(to + k * kGroup + lane);
  }

  void gather_row(int64_t start, int64_t count, A* to) const {
    for (int64_t done = 0; done < count; done += kGroup) {
      T values[kGroup] = {};
      uint8_t units[4] = {};
      for (int lane = 0; lane < smaller(kGroup, count - done); ++lane) {
        const int64_t j = done + lane;
        const int64_t at = start + j / depth_ * p_.stride_w + j % depth_ * p_.stride_c;
        values[lane] = problem_.in[at];
        if (!problem_.in_mask) continue;
        for (int plane = 0; plane < 2; ++plane)
          units[lane / 8 * 2 + plane] |=
              (problem_.in_mask[at / 8 * 2 + plane] >> at % 8 & 1) << lane % 8;
      }
      load_groups(values, units, 1, to + done);
    }
  }

  void add_to_sums(int64_t i) {
    const A* row = loaded_row(i) + (own_begin_ - load_begin_) * depth_;
    const int64_t pixels = own_end_ - own_begin_;
    double* totals = totals_ + channel_;
    if (depth_ == 1) {
      V sum(0.0);
      int64_t j = 0;
      for (; j <= pixels - V::lanes; j += V::lanes) sum = sum + V::load(row + j);
      totals[0] += sum.sum();
      for (; j < pixels; ++j) totals[0] += row[j];
      return;
    }
    for (int c = 0; c < depth_; c += V::lanes) {
      V sum(0.0);
      for (int64_t t = 0; t < pixels; ++t) sum = sum + V::load(row + t * depth_ + c);
      sum.store(part_ + c);
    }
    for (int c = 0; c < depth_; ++c) totals[c] += part_[c];
  }

  // Output rows [o, o + rows) through registers, of numbers of type D.
  template <class D>
  void stream(int64_t o, int64_t rows) {
    const int64_t seen = p_.taps_y + (rows - 1) * p_.down_y, first = y_.first(o);
    for (int64_t k = 0; k < seen; ++k) {
      const int64_t i = first + k;
      stream_rows_[k] = i < 0 || i >= y_.in ? nullptr : streamed_row<D>(i);
    }
    Block<D> block{stream_rows_.get(), begin_, end_, direct_ ? p_.stride_w : depth_,
                   nullptr, out_length_, depth_, rows, 0, 0, false};
    for (int64_t begin = 0; begin < width_; begin += problem_.step) {
      const int64_t x = out_x_ + begin;
      block.width = smaller(problem_.step, width_ - begin);
      block.first = x_.first(x);
      if constexpr (std::is_same<D, A>::value) block.to = row_;
      if constexpr (std::is_same<D, T>::value) {
        if (!problem_.buffers) {
          block.to = problem_.out + out_offset(o, x);
          block.pixel_step = problem_.channels_last ? p_.channels : 1;
          block.row_step = x_.out * block.pixel_step;
          block.past_cache = problem_.past_cache;
        }
      }
      with_stream_filter(p_.taps_x, p_.down_x, [&](auto filter) {
        const Stream<decltype(filter), D> stream(block, problem_.filter.along_x(),
                                                 problem_.filter.along_y());
        depth_ == 1 ? stream.plane() : stream.pixels(depth_);
      });
      for (int64_t k = 0; problem_.buffers && k < rows; ++k)
        finish_row(o + k, x, block.width, row_ + k * out_length_);
    }
  }

  template <class D>
  const D* streamed_row(int64_t i) const {
    if constexpr (std::is_same<D, T>::value) {
      if (direct_) return problem_.in + in_offset(i, begin_);
    }
    if constexpr (std::is_same<D, A>::value) return row_of_input(i, begin_);
    return nullptr;
  }

  // From column `first` of the image on.
  const A* row_of_input(int64_t i, int64_t first) const {
    if constexpr (std::is_same<T, A>::value) {
      if (direct_) return problem_.in + in_offset(i, first);
    }
    return loaded_row(i) + (first - load_begin_) * depth_;
  }

  int64_t out_offset(int64_t o, int64_t x) const {
    return problem_.channels_last
               ? ((sample_ * y_.out + o) * x_.out + x) * p_.channels + channel_
               : ((sample_ * p_.channels + channel_) * y_.out + o) * x_.out + x;
  }

  // Output rows [o, o + rows): some columns along y, then along x what these suffice for.
  void filter_separably(int64_t o, int64_t rows) {
    const int64_t phases = problem_.in_phases;
    int64_t done = seen_begin_;
    for (int64_t begin = 0; begin < width_; begin += problem_.step) {
      const int64_t end = smaller(width_, begin + problem_.step);
      const int64_t needed = larger(x_.last(out_x_ + end - 1) + 1 - seen_begin_, 0);
      const int64_t until =
          smaller(seen_begin_ + ceil_divide(needed, phases) * phases, seen_end_);
      const int64_t first = clip(done, begin_, end_), last = clip(until, begin_, end_);
      if (problem_.tall && first < last) filter_tall(o, rows, first, last);
      for (int64_t k = 0; until > done && k < rows; ++k) {
        A* row = filtered_row(k);
        if (!problem_.tall) filter_along_y(o + k, first, last, row);
        if (splits_input()) {
          split_columns(row, done - seen_begin_, until - seen_begin_, prepared_row(k));
        }
      }
      done = larger(done, until);
      for (int64_t k = 0; k < rows; ++k) filter_along_x(o + k, k * prepared_length_, begin, end);
    }
  }

  // Columns [first, last) of the image.
  void filter_along_y(int64_t o, int64_t first, int64_t last, A* row) {
    if (first == last) return;
    // Where the image itself is read, never less than a vector, which would be read beyond its end.
    if (direct_) first = larger(begin_, smaller(first, last - V::lanes));
    const int64_t begin = clip(y_.first(o), 0, y_.in), end = clip(y_.last(o) + 1, begin, y_.in);
    vertical_.count = 0;
    for (int64_t i = begin; i < end; ++i)
      vertical_.add(row_of_input(i, first), problem_.filter.along_y()[y_.tap(o, i)]);
    const int64_t step = direct_ && depth_ > 1 ? p_.stride_w : depth_;
    fir<V>(vertical_, Runs(0, last - first, depth_, step, depth_),
           row + (first - seen_begin_) * depth_);
  }

  // The same for output rows [o, o + rows).
  void filter_tall(int64_t o, int64_t rows, int64_t first, int64_t last) {
    const int64_t from = y_.first(o), seen = p_.taps_y + rows - 1;
    for (int64_t k = 0; k < seen; ++k) {
      const int64_t i = from + k;
      tall_rows_[k] = i < 0 || i >= y_.in ? nullptr : row_of_input(i, first);
    }
    TallFir<V>(tall_rows_.get(), problem_.filter.along_y(), p_.taps_y)
        .run(rows, (last - first) * depth_, filtered_row(0) + (first - seen_begin_) * depth_,
             prepared_length_);
  }

  // Pixels [begin, end) of an output row, from the prepared row `from`, and what follows.
  void filter_along_x(int64_t o, int64_t from, int64_t begin, int64_t end) {
    const int64_t pixels = end - begin;
    from += floor_divide(begin, problem_.out_phases) * depth_ *
            (splits_input() ? 1 : problem_.in_phases);
    const bool pair = problem_.out_phases == 2 && width_ > 1 &&
                      taps_[0].count == taps_[1].count && (depth_ == 1 || depth_ >= V::lanes);
    if (problem_.tail.e || problem_.add || (splits_output() && !pair)) {
      filter_row(pair, from, pixels, depth_, false, row_);
      finish_row(o, out_x_ + begin, pixels, row_);
    } else {
      const int64_t pixel = problem_.channels_last ? p_.channels : 1;
      filter_row(pair, from, pixels, pixel, problem_.past_cache,
                 problem_.out + out_offset(o, out_x_ + begin));
    }
  }

  template <class D>
  void filter_row(bool pair, int64_t from, int64_t pixels, int64_t pixel, bool past_cache,
                  D* to) {
    const int phases = problem_.out_phases;
    const int64_t step = splits_input() ? depth_ : static_cast<int64_t>(problem_.in_phases) * depth_;
    const auto pixels_of = [&](int r) { return ceil_divide(pixels - r, phases); };
    if (pair) {
      with_taps(taps_[0].count, [&](auto count) {
        constexpr int kTaps = decltype(count)::value;
        if constexpr (V::lanes > 1) {
          if (depth_ == 1) {
            return fir_interleaved<kTaps, V>(taps_[0], taps_[1], from, pixels, past_cache, to);
          }
        }
        fir_alternating<kTaps, V>(taps_[0], taps_[1], from, pixels, depth_, step, pixel, past_cache,
                                  to);
      });
    } else if (splits_output()) {
      if constexpr (std::is_same<D, A>::value) {
        for (int r = 0; r < smaller(phases, pixels); ++r)
          fir<V>(taps_[r], Runs(from, 1, pixels_of(r) * depth_, 0, 0),
                 phases_ + r * out_phase_length_);
        unsplit(phases_, pixels, depth_, phases, out_phase_length_, to);
      }
    } else {
      for (int r = 0; r < smaller(phases, pixels); ++r)
        fir<V>(taps_[r], Runs(from, pixels_of(r), depth_, step, phases * pixel), to + r * pixel);
    }
  }

  // Scale and bias of a tile: constants of a plane, patterns of a row of pixels.
  void start_tail() {
    const Epilogue* e = problem_.tail.e;
    if (!e) return;
    const int64_t length = depth_ == 1 ? kGroup : run_length(problem_.step);
    const A* scale = static_cast<const A*>(e->scale);
    const T* bias = static_cast<const T*>(e->bias);
    for (int64_t c = 0; c < depth_; c += kGroup) {
      const int64_t count = smaller(kGroup, depth_ - c);
      if (bias) load_padded<T, V>(bias + channel_ + c, count, bias_ + c);
    }
    const A* scales = scale ? scale + sample_ * p_.channels + channel_ : nullptr;
    for (int64_t j = 0; j < depth_; ++j) scale_[j] = scales ? scales[j] : A(1);
    for (int64_t j = depth_; j < length; ++j) {
      scale_[j] = scale_[j - depth_];
      bias_[j] = bias_[j - depth_];
    }
    std::memset(noise_, 0, kGroup * sizeof(A));
  }

  bool dense() const { return !problem_.channels_last || depth_ == p_.channels; }
  int64_t run_length(int64_t pixels) const { return dense() ? pixels * depth_ : depth_; }

  // The epilogue and `add` on filtered pixels of output row o, from pixel x on.
  void finish_row(int64_t o, int64_t x, int64_t pixels, A* filtered) {
    const Epilogue* e = problem_.tail.e;
    const int64_t pixel = problem_.channels_last ? p_.channels : 1;
    int64_t at = out_offset(o, x);
    const int64_t count = run_length(pixels), runs = pixels * depth_ / count;
    const A* noise = nullptr;
    if (e && e->noise) {
      noise = static_cast<const A*>(e->noise) + o * x_.out + x;
      if (e->noise_per_sample) noise += sample_ * y_.out * x_.out;
    }
    Coefficients<A> c{scale_, bias_, noise_, 0, 0, 0};
    if (depth_ > 1) c.scale_step = c.bias_step = kGroup;
    if (noise) c.noise_step = kGroup;
    for (int64_t r = 0; r < runs; ++r, at += pixel) {
      A* row = filtered + r * count;
      if (e) {
        if (noise && depth_ == 1) {
          c.noise = noise + r;
        } else if (noise) {
          for (int64_t t = 0; t < count / depth_; ++t)
            for (int j = 0; j < depth_; ++j) noise_[t * depth_ + j] = noise[r + t];
        }
        uint8_t* units = problem_.tail.mask ? problem_.tail.mask + at / 8 * 2 : nullptr;
        const ForwardConstants<V> constants(*e);
        if constexpr (std::is_same<T, A>::value) {
          if (!problem_.add) {
            problem_.tail.apply(constants, c, count, row, problem_.out + at, units);
            continue;
          }
        }
        problem_.tail.apply(constants, c, count, row, row, units);
      }
      write_run(row, at, count);
    }
  }

  void write_run(const A* row, int64_t at, int64_t count) const {
    const T* add = problem_.add ? problem_.add + at : nullptr;
    T* out = problem_.out + at;
    int64_t j = 0;
    for (; j <= count - V::lanes; j += V::lanes) {
      V v = V::load(row + j);
      if (add) v = v + load(add + j, V());
      store(out + j, v);
    }
    if (j == count) return;
    V v = V::load(row + j);
    if (add) {
      alignas(64) A rest[kGroup];
      load_padded<T, V>(add + j, count - j, rest);
      v = v + V::load(rest);
    }
    store_some(out + j, count - j, v);
  }

  const Problem<T, Source>& problem_;
  const Upfirdn2d& p_;
  const Axis x_, y_;
  int depth_;
  double* const totals_;
  const int64_t loaded_length_, phase_length_, prepared_length_, out_length_, out_phase_length_;
  const Buffer<A> numbers_;
  const Buffer<const A*> pointers_;
  const Buffer<const void*> stream_rows_;
  const Buffer<const A*> tall_rows_;
  const Buffer<Taps<A>> taps_;
  Taps<A> vertical_;
  A *loaded_, *prepared_, *filtered_, *row_, *phases_, *scale_, *bias_, *noise_, *part_;
  bool direct_;   // rows of the input are read where they are
  bool streams_;
  int64_t sample_, channel_, out_x_, width_, shift_;
  int64_t seen_begin_, seen_end_, begin_, end_, own_begin_, own_end_, load_begin_, load_end_;
};

template <class T, class Source>
void run(const Upfirdn2d& p, const Source& source, const void* in, const uint8_t* in_mask,
         const Epilogue* epilogue, const void* add, void* out, uint8_t* out_mask, void* sum,
         int threads) {
  using A = typename Compute<T>::Vector::Scalar;
  const Problem<T, Source> problem(p, source, static_cast<const T*>(in), in_mask, epilogue,
                                   static_cast<const T*>(add), static_cast<T*>(out), out_mask,
                                   sum != nullptr);
  const int used = problem.threads(threads);
  const int64_t rows = problem.tiles * p.out_height;
  const Buffer<double> totals(sum ? used * p.channels : 0);
  const Buffer<bool> lacks_memory(used);
#pragma omp parallel for num_threads(used) schedule(static, 1) if (used > 1)
  for (int thread = 0; thread < used; ++thread) {
    try {  // an exception may not leave a parallel region
      Worker<T, Source> worker(problem, totals.get() + (sum ? thread * p.channels : 0));
      worker.run(rows * thread / used, rows * (thread + 1) / used);
    } catch (const std::bad_alloc&) {
      lacks_memory[thread] = true;
    }
  }
  for (int thread = 0; thread < used; ++thread)
    if (lacks_memory[thread]) throw std::bad_alloc();
  for (int64_t c = 0; sum && c < p.channels; ++c) {
    double total = 0;
    for (int thread = 0; thread < used; ++thread) total += totals[thread * p.channels + c];
    static_cast<A*>(sum)[c] = static_cast<A>(total);
  }
}

}  // namespace

void upfirdn2d_forward(const Upfirdn2d& p, const Epilogue* epilogue, const void* x, const void* add,
                       void* y, uint8_t* mask, int threads) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    run<T>(p, Plain(), x, nullptr, epilogue, add, y, mask, nullptr, threads);
  });
}

void upfirdn2d_masked(const Upfirdn2d& p, const Epilogue& epilogue, double negative_slope,
                      const void* dy, const uint8_t* mask, void* dx, void* sum, int threads) {
  const Epilogue scaling{p.dtype, epilogue.geometry, Linear::code, 0.0, 1.0,
                         std::numeric_limits<double>::infinity(), epilogue.scale};
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = typename Compute<T>::Vector;
    const auto apply = [&](auto derivative) {
      run<T>(p, derivative, dy, mask, epilogue.scale ? &scaling : nullptr, nullptr, dx, nullptr,
             sum, threads);
    };
    mask ? apply(MaskedDerivative<V, true>(epilogue.gain, negative_slope))
         : apply(MaskedDerivative<V, false>(epilogue.gain, negative_slope));
  });
}

}  // namespace stylegan_fast::cpu::STYLEGAN_FAST_SIMD
