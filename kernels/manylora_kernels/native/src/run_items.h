// The order in which threads compute products' items and change their outputs.
#pragma once

#include <algorithm>
#include <memory>

#include "fusion.h"

namespace manylora {

// Outputs that are changed in long runs, once their product is done: a run for each thread, which
// takes the one whose reads it fetched, if nobody else has.
class LongRuns {
 public:
  // `steps`: how often each panel's item calls fetch_share.
  LongRuns(int threads, const PanelItems& panels, int64_t token, int64_t tokens, int64_t steps,
           const Fusion& fusion)
      : threads_(threads),
        panels_(panels),
        token_(token),
        tokens_(tokens),
        steps_(steps),
        fusion_(fusion),
        readers_(new Reader[threads]),
        taken_(new std::atomic<bool>[threads * panels.products()]()) {}

  int64_t count() const { return panels_.products() * threads_; }

  // What `thread` should fetch beside an item of `product`.
  Ahead& beside(int thread, int64_t product) {
    Reader& reader = readers_[thread];
    if (reader.product != product) {
      reader.product = product;
      reader.ahead = ahead_of(reader.runs, fusion_.reads(run(product, thread), reader.runs),
                              panels_.panels_of(product) * steps_ / threads_);
    }
    return reader.ahead;
  }

  void note_done(int64_t product) { done_[product].fetch_add(1); }

  // Changes one of the runs of `number`'s product; called once for each number in [0, count()).
  void change(int thread, int64_t number) {
    const int64_t product = number / threads_;
    int64_t part = thread;
    while (taken_[product * threads_ + part].exchange(true)) part = (part + 1) % threads_;
    // Items are handed out in order, so the threads that are waited for are at work.
    while (done_[product].load() < panels_.items_of(product)) {
    }
    const Outputs outputs = run(product, part);
    if (outputs.first < outputs.last) fusion_.after(outputs);
  }

 private:
  struct Reader {
    int64_t product = -1;
    Ahead ahead{};
    LineRun runs[kMostReads];
  };

  Outputs run(int64_t product, int64_t part) const {
    const int64_t all = panels_.outputs_of(product);
    const int64_t size = std::max(fusion_.outputs_at_once(),
                                  quotient_up(all, threads_ * kLineBytes) * kLineBytes);
    return {product, token_, tokens_, least(part * size, all), least((part + 1) * size, all)};
  }

  int64_t threads_;
  const PanelItems& panels_;
  int64_t token_;
  int64_t tokens_;
  int64_t steps_;
  const Fusion& fusion_;
  std::unique_ptr<Reader[]> readers_;
  std::unique_ptr<std::atomic<bool>[]> taken_;
  std::atomic<int64_t> done_[kMostProducts] = {};
};

// Computes all items for tokens [token, token + tokens), by compute(thread, item, ahead), and what
// is fused. `steps`: how many shares of `ahead` a panel's item fetches; 0: it fetches nothing.
//
// The long runs of all products but the last come within the last product's items, which keep the
// other threads computing meanwhile: they are bound by memory, the items by arithmetic.
template <typename Compute>
void run_items(int threads, const PanelItems& panels, int64_t token, int64_t tokens, int64_t steps,
               const Fusion& fusion, const Compute& compute) {
  if (fusion.outputs_at_once() == 0) {
    parallel(threads, panels.count(), 1, [&](int thread, int64_t number, int64_t) {
      const PanelItems::Item item = panels.item(number);
      Ahead nothing{};
      compute(thread, item, nothing);
      fusion.after(panels.outputs(item, token, tokens));
    });
    return;
  }
  LongRuns runs(threads, panels, token, tokens, steps, fusion);
  const int64_t last = panels.products() - 1;
  const int64_t early = last * threads;
  const int64_t before = panels.count() - (last > 0 ? panels.items_of(last) / 2 : 0);
  const auto run_item = [&](int thread, int64_t number) {
    const PanelItems::Item item = panels.item(number);
    Ahead nothing{};
    compute(thread, item, steps > 0 ? runs.beside(thread, item.product) : nothing);
    runs.note_done(item.product);
  };
  parallel(threads, panels.count() + runs.count(), 1, [&](int thread, int64_t number, int64_t) {
    if (number < before)
      run_item(thread, number);
    else if (number < before + early)
      runs.change(thread, number - before);
    else if (number < panels.count() + early)
      run_item(thread, number - early);
    else
      runs.change(thread, number - panels.count());
  });
}

}  // namespace manylora
