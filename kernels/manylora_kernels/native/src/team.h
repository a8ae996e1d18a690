// A team of threads that is kept together over many regions of work.
//
// Opening an OpenMP region for each kernel cost 30 us on a virtual machine, ten times a small
// kernel's time: libgomp waits with PAUSE, which lets the hypervisor take the processor away, and
// every region waits for all threads, also for one that is late. A team is opened once for a whole
// run of kernels. Its threads watch for work without PAUSE at first, and who comes late to a
// region is not waited for: the others have done its share.
#pragma once

#include <atomic>
#include <cstdint>

namespace manylora {

class Team {
 public:
  using Function = void (*)(void*);

  // The team that the calling thread leads, if any.
  static Team*& led();

  // Lets the members take part in function(data), and takes part itself; returns once everyone who
  // did has left it. By the leader only.
  void run(Function function, void* data);

  // A member's life: until the leader dismisses the team.
  void serve();
  void dismiss() { dismissed_.store(true); }

 private:
  // On a line of its own: members watch it all the time.
  alignas(64) std::atomic<uint64_t> round_{0};
  std::atomic<bool> dismissed_{false};
  alignas(64) std::atomic<bool> open_{false};
  std::atomic<int> inside_{0};
  Function function_ = nullptr;
  void* data_ = nullptr;
};

// Runs function(data) in the calling thread as the leader of a team of `threads`, or alone.
void with_team(int threads, Team::Function function, void* data);

}  // namespace manylora
