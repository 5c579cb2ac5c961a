from stepmoe.charts.dataflow import dataflow
