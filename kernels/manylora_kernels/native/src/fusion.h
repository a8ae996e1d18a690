// Work of another kind in the regions of a product: what needs its x only, beside the packing of x;
// what changes its outputs, right after them.
//
// Products that share an x share their regions too: each kind of product takes several jobs.
#pragma once

#include <cstdint>

#include "ahead.h"
#include "runtime.h"

namespace manylora {

// Most products that share their regions.
constexpr int64_t kMostProducts = 8;
constexpr int64_t kMostReads = 32;

// Outputs [first, last) of one product for tokens [token, token + tokens).
struct Outputs {
  int64_t product;
  int64_t token;
  int64_t tokens;
  int64_t first;
  int64_t last;
};

// Without overrides: nothing is fused.
class Fusion {
 public:
  virtual ~Fusion() = default;
  // Items of work on x, run in any order and by any thread before any output.
  virtual int64_t items_before() const { return 0; }
  virtual void before(int64_t /*item*/) const {}
  // Changes outputs that are computed; called once for each token and output.
  virtual void after(const Outputs& /*outputs*/) const {}
  // How many outputs `after` should be given at least; 0: whatever an item has, by the thread that
  // computed them, while they lie in its cache.
  virtual int64_t outputs_at_once() const { return 0; }
  // Writes where lies what `after` reads for these outputs, at most kMostReads; returns how many.
  virtual int64_t reads(const Outputs& /*outputs*/, LineRun* /*runs*/) const { return 0; }
};

inline const Fusion& nothing_fused() {
  static const Fusion nothing;
  return nothing;
}

// Panels of rows of several products, cut into items of at most `size` panels of one product.
class PanelItems {
 public:
  explicit PanelItems(int64_t panel_rows) : panel_rows_(panel_rows) {}

  void add(int64_t outputs) {
    outputs_[products_] = outputs;
    panels_ += panels_of(products_++);
  }
  int64_t panels() const { return panels_; }

  void cut(int64_t size) {
    size_ = size;
    count_ = 0;
    for (int64_t i = 0; i < products_; ++i) count_ += items_of(i);
  }
  int64_t count() const { return count_; }

  struct Item {
    int64_t product;
    int64_t first;  // panels
    int64_t last;
  };
  Item item(int64_t number) const {
    int64_t product = 0;
    for (; number >= items_of(product); ++product) number -= items_of(product);
    const int64_t first = number * size_;
    return {product, first, least(first + size_, panels_of(product))};
  }
  int64_t products() const { return products_; }
  int64_t panels_of(int64_t product) const { return quotient_up(outputs_[product], panel_rows_); }
  int64_t items_of(int64_t product) const { return quotient_up(panels_of(product), size_); }
  int64_t outputs_of(int64_t product) const { return outputs_[product]; }
  Outputs outputs(const Item& item, int64_t token, int64_t tokens) const {
    return {item.product, token, tokens, item.first * panel_rows_,
            least(item.last * panel_rows_, outputs_[item.product])};
  }

 private:
  int64_t panel_rows_;
  int64_t outputs_[kMostProducts] = {};
  int64_t products_ = 0;
  int64_t panels_ = 0;
  int64_t size_ = 1;
  int64_t count_ = 0;
};

// Packs parts [0, units), `size` at a time and by `packers` threads, beside the fused work on x,
// by `threads`.
template <typename Pack>
void prepare(int packers, int64_t units, int64_t size, int threads, const Fusion& fusion,
             const Pack& pack) {
  const int64_t packs = quotient_up(units, size);
  const int64_t others = fusion.items_before();
  parallel(others > 0 ? threads : packers, packs + others, 1, [&](int, int64_t item, int64_t) {
    if (item < packs)
      pack(item * size, least((item + 1) * size, units));
    else
      fusion.before(item - packs);
  });
}

}  // namespace manylora
