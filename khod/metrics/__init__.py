# SPDX-License-Identifier: LGPL-2.1-or-later
"""What monitoring asks of a handover: one table of metrics, as Prometheus' text and for `io.systemd.Metrics`."""
